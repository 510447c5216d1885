-- The calls of a partition whose lease has expired; one sweeper at a time gets them, and none while a living process
-- has a spool to replay: it may know what these calls used.
--
-- KEYS 1 holds   2 leases   3 progress   4 lock of the sweeper   5 until when each producer has a spool to replay
-- ARGV 1 producer of the sweeper   2 how long the lock is kept, ms   3 calls at most   4 calls to leave out, the oldest
-- Reply call id, hold record and progress record ('' when unknown), call after call

local owner = redis.call('GET', KEYS[4])
if owner and owner ~= ARGV[1] then
  return {}
end
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now_ms)
if redis.call('EXISTS', KEYS[5]) == 1 then
  return {}
end
redis.call('SET', KEYS[4], ARGV[1], 'PX', ARGV[2])
local expired = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms, 'LIMIT', ARGV[4], ARGV[3])
local reply = {}
for _, call_id in ipairs(expired) do
  reply[#reply + 1] = call_id
  reply[#reply + 1] = redis.call('HGET', KEYS[1], call_id) or ''
  reply[#reply + 1] = redis.call('HGET', KEYS[3], call_id) or ''
end
return reply
