-- Release the hold of a call that was never forwarded; there is nothing to record.
--
-- KEYS 1 holds   2 leases   3 progress   4,5 scope of tenant, key
-- ARGV 1 call id
-- Reply 1 when there was a hold

local hold = redis.call('HGET', KEYS[1], ARGV[1])
if not hold then
  return 0
end
local record = cmsgpack.unpack(hold)
local released = string.format('%.0f', 0 - record[1])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
for scope = 4, 5 do
  redis.call('HINCRBY', KEYS[scope], 'running', -1)
  redis.call('HINCRBY', KEYS[scope], 'held', released)
end
if record[13] then
  redis.call('HINCRBY', KEYS[4], 'held:' .. record[5], released)
end
return 1
