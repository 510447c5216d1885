-- Admission: all limits of the tenant and the key, and the hold, or nothing.
--
-- KEYS 1 holds   2 leases   3,4 scope of tenant, key   5,6 month of tenant, key   7,8 rate of tenant, key
--      9 credits spent, of a prepaid tenant
-- ARGV 1-4 tenant: requests per minute, tokens per minute, concurrent calls, monthly budget in nano-currency
--      5-8 the same of the key; '' is no limit
--      9 call id   10 hold record   11 lease, ms   12 estimate, nano-currency   13 estimate, tokens
--      and only where such a limit applies: 14 served model id   15 its monthly budget, '' is none
--      and only of a prepaid tenant: 16 month since which credits count   17 balance   18 what is known to be used of it
-- Reply {1, second, requests and tokens used in the tenant's window, the same of the key}
--    or {0, limit name, scope (1 tenant, 2 key, 3 model), seconds until a retry can pass (0: none can), used}
-- All numbers stay below 2^53: Lua compares doubles. Limits above are refused by the gateway, and so are calls whose
-- hold or tokens would take a sum above it, whatever the limits: a sum that was cut off could not be released exactly.

local WINDOW_S = 60
local SUM_MAX = 2^53 - 1
local SLOTS = WINDOW_S + 1  -- the current, unfinished second counts too: never over the limit in any 60 s

local call = redis.call
local clock = call('TIME')
local now_s = tonumber(clock[1])
local now_ms = now_s * 1000 + math.floor(tonumber(clock[2]) / 1000)
local nano = tonumber(ARGV[12])
local tokens = tonumber(ARGV[13])

-- Forget what left the window of `key`; return the second it stands at, the sums of the window, and those of the
-- slot of that second.
local function advance(key)
  local slot = now_s % SLOTS
  local state = call('HMGET', key, 'second', 'requests', 'tokens', 'r' .. slot, 't' .. slot)
  local second = tonumber(state[1])
  local requests_used = tonumber(state[2]) or 0
  local tokens_used = tonumber(state[3]) or 0
  if not second then
    return now_s, 0, 0, 0, 0
  end
  if now_s == second then
    return second, requests_used, tokens_used, tonumber(state[4]) or 0, tonumber(state[5]) or 0
  end
  if now_s < second then
    -- The clock was set back: the window stays where it was.
    slot = second % SLOTS
    local counts = call('HMGET', key, 'r' .. slot, 't' .. slot)
    return second, requests_used, tokens_used, tonumber(counts[1]) or 0, tonumber(counts[2]) or 0
  end
  if now_s - second >= SLOTS then
    call('DEL', key)
    return now_s, 0, 0, 0, 0
  end
  local fields = {}
  for passing = second + 1, now_s do
    fields[#fields + 1] = 'r' .. passing % SLOTS
    fields[#fields + 1] = 't' .. passing % SLOTS
  end
  local gone = call('HMGET', key, unpack(fields))
  for index = 1, #gone, 2 do
    requests_used = requests_used - (tonumber(gone[index]) or 0)
    tokens_used = tokens_used - (tonumber(gone[index + 1]) or 0)
  end
  call('HDEL', key, unpack(fields))
  call('HSET', key, 'second', now_s, 'requests', requests_used, 'tokens', tokens_used)
  call('EXPIRE', key, 2 * WINDOW_S)
  return now_s, requests_used, tokens_used, 0, 0
end

-- Seconds until `excess` of slot kind `kind` has left the window that stands at `second`.
local function compute_wait(key, kind, second, excess)
  for age = WINDOW_S, 1, -1 do
    local slot = (second - age) % SLOTS
    excess = excess - (tonumber(call('HGET', key, kind .. slot)) or 0)
    if excess <= 0 then
      return SLOTS - age
    end
  end
  return SLOTS
end

-- Nil where the estimate fits into `limit`, else the refusal: by what is spent (no retry helps), or by what is held.
local function refuse_money(name, scope, limit, spent, held)
  if spent + nano > limit then
    return {0, name, scope, 0, spent}
  elseif spent + held + nano > limit then
    return {0, name, scope, 1, spent}
  end
end

local model_budget = ARGV[15] or ''
local model_held
if model_budget ~= '' then
  model_held = 'held:' .. ARGV[14]
  local spent = tonumber(call('HGET', KEYS[5], ARGV[14] .. ':cost')) or 0
  local held = tonumber(call('HGET', KEYS[3], model_held)) or 0
  local refusal = refuse_money('budget', 3, tonumber(model_budget), spent, held)
  if refusal then
    return refusal
  end
end

local unseen = 0  -- what billing knows to be used, and this server does not: it has lost data, or never saw it
if ARGV[16] then
  local since, spent = tonumber(ARGV[16]), 0
  local months = call('HGETALL', KEYS[9])
  for index = 1, #months, 2 do
    if tonumber(months[index]) >= since then
      spent = spent + tonumber(months[index + 1])
    elseif tonumber(months[index]) + 100 < since then  -- more than a year earlier
      call('HDEL', KEYS[9], months[index])
    end
  end
  unseen = math.max(0, tonumber(ARGV[18]) - spent)
  local held = tonumber(call('HGET', KEYS[3], 'held')) or 0
  local refusal = refuse_money('balance', 1, tonumber(ARGV[17]), spent + unseen, held)
  if refusal then
    return refusal
  end
end

local windows = {}
for scope = 1, 2 do
  local base = scope * 4 - 3
  local requests_max, tokens_max = ARGV[base], ARGV[base + 1]
  local concurrent_max, budget = ARGV[base + 2], ARGV[base + 3]
  local now = call('HMGET', KEYS[2 + scope], 'running', 'held')
  local running, held = tonumber(now[1]) or 0, tonumber(now[2]) or 0
  if budget ~= '' then
    local spent = tonumber(call('HGET', KEYS[4 + scope], 'cost')) or 0
    local refusal = refuse_money('budget', scope, tonumber(budget), spent, held)
    if refusal then
      return refusal
    end
  elseif held + nano > SUM_MAX then
    return {0, 'budget', scope, 1, held}
  end
  if concurrent_max ~= '' and running >= tonumber(concurrent_max) then
    return {0, 'concurrent_calls', scope, 1, running}
  end
  if requests_max ~= '' or tokens_max ~= '' then
    local rate = KEYS[6 + scope]
    local second, requests_used, tokens_used, slot_requests, slot_tokens = advance(rate)
    if requests_max ~= '' and requests_used + 1 > tonumber(requests_max) then
      local wait = compute_wait(rate, 'r', second, requests_used + 1 - tonumber(requests_max))
      return {0, 'requests', scope, wait, requests_used}
    end
    local limit = tonumber(tokens_max) or SUM_MAX
    if tokens_used + tokens > limit then
      local wait = 0
      if tokens <= limit then
        wait = compute_wait(rate, 't', second, tokens_used + tokens - limit)
      end
      return {0, 'tokens', scope, wait, tokens_used}
    end
    windows[scope] = {second, requests_used + 1, tokens_used + tokens, slot_requests + 1, slot_tokens + tokens}
  end
end

local reply = {1, now_s, 0, 0, 0, 0}
for scope = 1, 2 do
  local window = windows[scope]
  if window then
    local rate = KEYS[6 + scope]
    local slot = window[1] % SLOTS
    call('HSET', rate, 'second', window[1], 'requests', window[2], 'tokens', window[3],
      'r' .. slot, window[4], 't' .. slot, window[5])
    if window[2] == 1 or window[4] == 1 then
      -- The first of its second: it need not be said more often.
      call('EXPIRE', rate, 2 * WINDOW_S)
    end
    reply[2] = window[1]
    reply[1 + 2 * scope] = window[2]
    reply[2 + 2 * scope] = window[3]
  end
  call('HINCRBY', KEYS[2 + scope], 'running', 1)
  call('HINCRBY', KEYS[2 + scope], 'held', ARGV[12])
end
if model_held then
  call('HINCRBY', KEYS[3], model_held, ARGV[12])
end
if unseen > 0 then
  call('HINCRBY', KEYS[9], ARGV[16], string.format('%.0f', unseen))
end
call('HSET', KEYS[1], ARGV[9], ARGV[10])
call('ZADD', KEYS[2], now_ms + tonumber(ARGV[11]), ARGV[9])
return reply
