-- Reserve a tenant's Idempotency-Key, renew, fill or free the reservation: all of them change only one's own.
--
-- KEYS 1 what is kept under the key
-- ARGV 1 one's own reservation   2 what to keep from now on   3 for how long, ms; '0': keep nothing
-- Reply nil when done, otherwise what somebody else keeps there.

local kept = redis.call('GET', KEYS[1])
if kept and kept ~= ARGV[1] then
  return kept
end
if ARGV[3] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
end
return false
