-- Admission: all limits of the tenant and the key, and the hold, or nothing.
--
-- KEYS 1 holds   2 leases   3,4 scope of tenant, key   5,6 month of tenant, key   7,8 rate of tenant, key
-- ARGV 1 call id   2 hold record   3 lease, ms   4 estimate, nano-currency   5 estimate, tokens
--      6-9 tenant: requests per minute, tokens per minute, concurrent calls, monthly budget in nano-currency
--      10-13 the same of the key; '' is no limit
-- Reply {1, second, requests and tokens used in the tenant's window, the same of the key}
--    or {0, limit name, scope (1 tenant, 2 key), seconds until a retry can pass (0: not this month), used}
-- All numbers stay below 2^53: Lua compares doubles. Limits above are refused by the gateway.

local WINDOW_S = 60
local SLOTS = WINDOW_S + 1  -- the current, unfinished second counts too: never over the limit in any 60 s

local clock = redis.call('TIME')
local now_s = tonumber(clock[1])
local now_ms = now_s * 1000 + math.floor(tonumber(clock[2]) / 1000)
local nano = tonumber(ARGV[4])
local tokens = tonumber(ARGV[5])

-- Forget what left the window of `key`; return the second it stands at and the sums of the window.
local function advance(key)
  local state = redis.call('HMGET', key, 'second', 'requests', 'tokens')
  local second = tonumber(state[1])
  local requests_used = tonumber(state[2]) or 0
  local tokens_used = tonumber(state[3]) or 0
  if not second then
    return now_s, 0, 0
  end
  if now_s <= second then
    return second, requests_used, tokens_used
  end
  if now_s - second >= SLOTS then
    redis.call('DEL', key)
    return now_s, 0, 0
  end
  local fields = {}
  for passing = second + 1, now_s do
    fields[#fields + 1] = 'r' .. passing % SLOTS
    fields[#fields + 1] = 't' .. passing % SLOTS
  end
  local gone = redis.call('HMGET', key, unpack(fields))
  for index = 1, #gone, 2 do
    requests_used = requests_used - (tonumber(gone[index]) or 0)
    tokens_used = tokens_used - (tonumber(gone[index + 1]) or 0)
  end
  redis.call('HDEL', key, unpack(fields))
  redis.call('HSET', key, 'second', now_s, 'requests', requests_used, 'tokens', tokens_used)
  return now_s, requests_used, tokens_used
end

-- Seconds until `excess` of slot kind `kind` has left the window that stands at `second`.
local function compute_wait(key, kind, second, excess)
  for age = WINDOW_S, 1, -1 do
    local slot = (second - age) % SLOTS
    excess = excess - (tonumber(redis.call('HGET', key, kind .. slot)) or 0)
    if excess <= 0 then
      return SLOTS - age
    end
  end
  return SLOTS
end

local windows = {}
for scope = 1, 2 do
  local base = 2 + scope * 4
  local requests_max, tokens_max = ARGV[base], ARGV[base + 1]
  local concurrent_max, budget = ARGV[base + 2], ARGV[base + 3]
  if budget ~= '' then
    local limit = tonumber(budget)
    local spent = tonumber(redis.call('HGET', KEYS[4 + scope], 'cost')) or 0
    local held = tonumber(redis.call('HGET', KEYS[2 + scope], 'held')) or 0
    if spent + nano > limit then
      return {0, 'budget', scope, 0, spent}
    elseif spent + held + nano > limit then
      return {0, 'budget', scope, 1, spent}
    end
  end
  if concurrent_max ~= '' then
    local running = tonumber(redis.call('HGET', KEYS[2 + scope], 'running')) or 0
    if running >= tonumber(concurrent_max) then
      return {0, 'concurrent_calls', scope, 1, running}
    end
  end
  if requests_max ~= '' or tokens_max ~= '' then
    local rate = KEYS[6 + scope]
    local second, requests_used, tokens_used = advance(rate)
    if requests_max ~= '' and requests_used + 1 > tonumber(requests_max) then
      local wait = compute_wait(rate, 'r', second, requests_used + 1 - tonumber(requests_max))
      return {0, 'requests', scope, wait, requests_used}
    end
    if tokens_max ~= '' and tokens_used + tokens > tonumber(tokens_max) then
      local wait = 0
      if tokens <= tonumber(tokens_max) then
        wait = compute_wait(rate, 't', second, tokens_used + tokens - tonumber(tokens_max))
      end
      return {0, 'tokens', scope, wait, tokens_used}
    end
    windows[scope] = {second, requests_used + 1, tokens_used + tokens}
  end
end

local reply = {1, now_s, 0, 0, 0, 0}
for scope = 1, 2 do
  local window = windows[scope]
  if window then
    local rate = KEYS[6 + scope]
    local slot = window[1] % SLOTS
    redis.call('HSET', rate, 'second', window[1], 'requests', window[2], 'tokens', window[3])
    redis.call('HINCRBY', rate, 'r' .. slot, 1)
    redis.call('HINCRBY', rate, 't' .. slot, ARGV[5])
    redis.call('EXPIRE', rate, 2 * WINDOW_S)
    reply[2] = window[1]
    reply[1 + 2 * scope] = window[2]
    reply[2 + 2 * scope] = window[3]
  end
  redis.call('HINCRBY', KEYS[2 + scope], 'running', 1)
  redis.call('HINCRBY', KEYS[2 + scope], 'held', ARGV[4])
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[3]), ARGV[1])
return reply
