-- The hold of a call that was admitted while this server was away (its intent lay in a spool). No limits.
--
-- KEYS 1 holds   2 leases   3,4 scope of tenant, key   5 marker of an ended call
-- ARGV 1 call id   2 hold record   3 lease, ms
-- Reply 1 when the hold stands, 0 when the call has ended already
-- The call has been served, so its hold must stand. Where a sum would not stay below 2^53 it is one for no money: the
-- record says so, and its release takes nothing away.

local SUM_MAX = 2^53 - 1
if redis.call('EXISTS', KEYS[5]) == 1 then
  return 0
end
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  local hold = ARGV[2]
  -- The record is a msgpack array of less than 16: one byte, then the amount.
  local rest, nano = cmsgpack.unpack_one(hold, 1)
  for scope = 3, 4 do
    if nano > 0 and (tonumber(redis.call('HGET', KEYS[scope], 'held')) or 0) + nano > SUM_MAX then
      nano, hold = 0, hold:sub(1, 1) .. cmsgpack.pack(0) .. hold:sub(rest + 1)
    end
  end
  redis.call('HSET', KEYS[1], ARGV[1], hold)
  for scope = 3, 4 do
    redis.call('HINCRBY', KEYS[scope], 'running', 1)
    redis.call('HINCRBY', KEYS[scope], 'held', string.format('%.0f', nano))
  end
end
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[3]), ARGV[1])
return 1
