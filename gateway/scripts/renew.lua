-- Renew the leases of live calls, with their counts so far.
--
-- KEYS 1 holds   2 leases   3 progress
-- ARGV 1 lease, ms   then pairs of call id and progress record ('' when nothing is known)
-- Reply the number of leases renewed

local clock = redis.call('TIME')
local expires_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000) + tonumber(ARGV[1])
local renewed = 0
for index = 2, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[index]) == 1 then
    redis.call('ZADD', KEYS[2], expires_ms, ARGV[index])
    if ARGV[index + 1] ~= '' then
      redis.call('HSET', KEYS[3], ARGV[index], ARGV[index + 1])
    end
    renewed = renewed + 1
  end
end
return renewed
