-- The hold of a call that was admitted while this server was away (its intent lay in a spool). No limits.
--
-- KEYS 1 holds   2 leases   3,4 scope of tenant, key   5 marker of an ended call
-- ARGV 1 call id   2 hold record   3 lease, ms
-- Reply 1 when the hold stands, 0 when the call has ended already

if redis.call('EXISTS', KEYS[5]) == 1 then
  return 0
end
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 1 then
  local nano = cmsgpack.unpack(ARGV[2])[1]
  for scope = 3, 4 do
    redis.call('HINCRBY', KEYS[scope], 'running', 1)
    redis.call('HINCRBY', KEYS[scope], 'held', string.format('%.0f', nano))
  end
end
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[3]), ARGV[1])
return 1
