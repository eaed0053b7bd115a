-- Notes how the fleet stands, once an interval whoever asks: its counters, summed over models, and what there is right now.
-- Before that it counts the energy that GPUs have used since the last sample.
-- Each window's list gets the sample if one of its steps has begun since the last, and keeps its length.
-- ARGV: most samples of a window, then window, its step in s …, the finest first; each is a multiple of that
-- Returns 1 if it was due, else 0
local now = now_ms()
local finest = ARGV[3]
local interval, last = math.floor(now / finest / 1000), redis.call('GET', K.SAMPLED)
if last == tostring(interval) then return 0 end
redis.call('SET', K.SAMPLED, tostring(interval))

local IS_LINE = {high = true, normal = true, low = true}

-- The counters of energy, crashes, fuses, tasks and pictures, whatever the model or cause: that part of their fields is left
-- out. Of crashes and fuses there is always a count, so that who reads knows that they were looked for.
local function counters()
  local kept = {submitted = true, images = true, tasks = true, took = true, fuses = true}
  local sums = {crashes = 0, fuses = 0}
  local all = redis.call('HGETALL', K.COUNTS)
  for i = 1, #all, 2 do
    if all[i] == 'joules' or all[i] == 'crashes' then sums[all[i]] = tonumber(all[i + 1]) end
    local what, rest = string.match(all[i], '^(%l+)|[^|]+(.*)$')
    if kept[what] and rest ~= '|sum' then sums[what .. rest] = (sums[what .. rest] or 0) + all[i + 1] end
  end
  return sums
end

-- Milliseconds that the oldest task in line has been there; nil if none is.
local function oldest_age()
  local open = redis.call('ZRANGE', K.OPEN, 0, redis.call('ZCARD', K.LEASES), 'WITHSCORES')
  for i = 1, #open, 2 do
    if redis.call('HGET', K.TASK .. open[i], 'status') == 'queued' then return now - open[i + 1] end
  end
end

-- What waits by model and priority, all tenants together, and for how many ms the oldest at the head of a queue has, if
-- anybody knows. It costs three commands for each queue that holds anything, however many tasks.
local function lines()
  local found = {}
  for _, queue in ipairs(redis.call('SMEMBERS', K.RQ_QUEUES)) do
    local model, priority = string.match(queue, '^' .. K.RQ_QUEUE .. '([^.]+)%.(%l+)%.')
    local queued = IS_LINE[priority] and redis.call('LLEN', queue) or 0
    if queued > 0 then
      local head = redis.call('LRANGE', queue, 0, 0)[1]
      local created = redis.call('HGET', K.TASK .. head, 'created_at')
      found[model] = found[model] or {}
      local waits = found[model][priority] or {queued = 0}
      waits.queued = waits.queued + queued
      if created then waits.oldest_age_ms = math.max(waits.oldest_age_ms or 0, now - created) end
      found[model][priority] = waits
    end
  end
  return found
end

-- The last reading of each GPU, by host and index, and how many live workers tell of something.
local function gpus()
  local there, found = 0, {}
  for _, worker in ipairs(redis.call('ZRANGE', K.WORKERS, 0, -1)) do -- those that beat last come last
    local text = redis.call('GET', K.CARD .. worker)
    local card = text and cjson.decode(text) or {state = 'lost'}
    if card.state ~= 'lost' then there = there + 1 end
    if type(card.gpu) == 'table' then found[card.host .. '|' .. card.gpu.index] = card.gpu end
  end
  return found, there
end

-- What these readings say of all GPUs together.
local function figures(readings)
  local told, busy, used = 0, 0, nil
  for _, gpu in pairs(readings) do
    if type(gpu.utilisation_percent) == 'number' then told, busy = told + 1, busy + gpu.utilisation_percent end
    if type(gpu.memory_used_mb) == 'number' then used = (used or 0) + gpu.memory_used_mb end
  end
  return {gpu_utilisation_percent = told > 0 and busy / told or nil, gpu_memory_used_mb = used}
end

-- Forgets what has not been told of for long: values of a hash end in when they were told.
local function forget(hash, ttl_s)
  local told = redis.call('HGETALL', hash)
  for i = 1, #told, 2 do
    if now - string.match(told[i + 1], '%d+$') > ttl_s * 1000 then redis.call('HDEL', hash, told[i]) end
  end
end

-- Counts the whole joules by which readings have grown. What is new begins here, and what went back anew: its driver was
-- loaded again, or another GPU has its place.
local function count_energy(readings)
  local grown = nil
  for gpu, reading in pairs(readings) do
    if type(reading.energy_j) == 'number' then
      local joules = math.floor(reading.energy_j)
      local before = string.match(redis.call('HGET', K.ENERGY, gpu) or '', '^%d+') or joules
      grown = (grown or 0) + math.max(0, joules - before)
      redis.call('HSET', K.ENERGY, gpu, string.format('%.0f %.0f', joules, now))
    end
  end
  if grown then count({'joules', grown}) end
end

forget(K.DISKS, K.DISK_TTL_S)
forget(K.ENERGY, K.ENERGY_TTL_S)
local readings, workers = gpus()
count_energy(readings)
local sample = figures(readings)
sample.at, sample.counts, sample.workers, sample.lines = now, counters(), workers, lines()
sample.running = redis.call('ZCARD', K.LEASES)
sample.queued = math.max(0, redis.call('ZCARD', K.OPEN) - sample.running)
sample.oldest_age_ms = oldest_age()
local text = cjson.encode(sample)
for i = 2, #ARGV, 2 do
  local list, intervals = K.HISTORY .. ARGV[i], ARGV[i + 1] / finest
  local began = not last or math.floor(last / intervals) ~= math.floor(interval / intervals)
  if began or redis.call('EXISTS', list) == 0 then
    redis.call('RPUSH', list, text)
    redis.call('LTRIM', list, -ARGV[1], -1)
  end
end
return 1
