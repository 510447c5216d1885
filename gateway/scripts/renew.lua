-- Renew the leases of live calls, with their counts so far, and say whether events of this process wait in a spool.
--
-- KEYS 1 holds   2 leases   3 progress   4 until when each producer has a spool to replay
-- ARGV 1 lease, ms   2 producer   3 '1' when it has a spool to replay
--      then pairs of call id and progress record ('' when nothing is known)
-- Reply the number of leases renewed

local clock = redis.call('TIME')
local expires_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000) + tonumber(ARGV[1])
if ARGV[3] == '1' then
  redis.call('ZADD', KEYS[4], expires_ms, ARGV[2])
else
  redis.call('ZREM', KEYS[4], ARGV[2])
end
local renewed = 0
for index = 4, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[index]) == 1 then
    redis.call('ZADD', KEYS[2], expires_ms, ARGV[index])
    if ARGV[index + 1] ~= '' then
      redis.call('HSET', KEYS[3], ARGV[index], ARGV[index + 1])
    end
    renewed = renewed + 1
  end
end
return renewed
