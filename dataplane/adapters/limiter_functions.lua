#!lua name=postroad
-- Token buckets. A key holds "<micro-tokens> <microseconds>": the level and when it was so, by this server's clock.
-- A key that is missing is a full bucket, and a key expires when its bucket would be full again.

local MICRO = 1000000
local DAY_US = 86400 * MICRO

-- The level now. A clock that went back counts as no time, so that nothing is taken away.
local function level_of(key, capacity, rate, now)
  local value = redis.call('GET', key)
  if not value then
    return capacity
  end
  local level, since = string.match(value, '^(%d+) (%d+)$')
  if not level then
    return capacity
  end
  local elapsed = math.max(0, now - tonumber(since))
  return math.min(capacity, tonumber(level) + math.floor(elapsed * rate / MICRO))
end

local function store(key, level, capacity, rate, now)
  local until_full_us = DAY_US
  if rate > 0 then
    until_full_us = (capacity - level) * MICRO / rate
  end
  local expire_ms = math.max(1, math.ceil(until_full_us / 1000))
  redis.call('SET', key, string.format('%.0f %.0f', level, now), 'PX', string.format('%.0f', expire_ms))
end

-- KEYS: one for each bucket, in the order of the groups.
-- ARGS: number of groups; for each group how many buckets it wants; for each bucket capacity, rate per second and
-- cost, all in whole micro-tokens. A group gets all it wants or nothing. A cost above the capacity empties the bucket.
-- Returns for each group two numbers: microseconds to wait and which of its buckets refused; 0 and 0 when granted.
local function take(keys, args)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * MICRO + tonumber(time[2])
  local answers = {}
  local key_at, arg_at = 0, 1
  for _ = 1, tonumber(args[1]) do
    local count = tonumber(args[arg_at + 1])
    arg_at = arg_at + 1
    local levels, wait, refused = {}, 0, 0
    for bucket = 1, count do
      local key = keys[key_at + bucket]
      local at = arg_at + (bucket - 1) * 3
      local capacity, rate, cost = tonumber(args[at + 1]), tonumber(args[at + 2]), tonumber(args[at + 3])
      local level = (levels[key] or level_of(key, capacity, rate, now)) - math.min(cost, capacity)
      levels[key] = level
      if level < 0 then
        local needs = rate > 0 and math.ceil(-level * MICRO / rate) or DAY_US
        if needs > wait then
          wait, refused = needs, bucket
        end
      end
    end
    if refused == 0 then
      for bucket = 1, count do
        local key = keys[key_at + bucket]
        local at = arg_at + (bucket - 1) * 3
        store(key, levels[key], tonumber(args[at + 1]), tonumber(args[at + 2]), now)
      end
    end
    answers[#answers + 1] = wait
    answers[#answers + 1] = refused
    key_at = key_at + count
    arg_at = arg_at + count * 3
  end
  return answers
end

-- The number is part of the name: nodes of two versions may share a server.
redis.register_function('postroad_take_1', take)
