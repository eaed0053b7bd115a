-- Notes how the fleet stands, once an interval whoever asks: its counters, summed over models, and what there is right now.
-- Each window's list gets the sample if one of its steps has begun since the last, and keeps its length.
-- ARGV: most samples of a window, then window, its step in s …, the finest first; each is a multiple of that
-- Returns 1 if it was due, else 0
local now = now_ms()
local finest = ARGV[3]
local interval, last = math.floor(now / finest / 1000), redis.call('GET', K.SAMPLED)
if last == tostring(interval) then return 0 end
redis.call('SET', K.SAMPLED, tostring(interval))

-- The counters of tasks and pictures, whatever the model: that part of their fields is left out.
local function counters()
  local kept, sums = {submitted = true, images = true, tasks = true, took = true}, {}
  local all = redis.call('HGETALL', K.COUNTS)
  for i = 1, #all, 2 do
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

-- What the live workers' cards say, each GPU once.
local function workers()
  local there, gpus, told, busy, used = 0, {}, 0, 0, nil
  for _, worker in ipairs(redis.call('ZRANGE', K.WORKERS, 0, -1)) do
    local text = redis.call('GET', K.CARD .. worker)
    local card = text and cjson.decode(text) or {state = 'lost'}
    if card.state ~= 'lost' then there = there + 1 end
    local gpu = type(card.gpu) == 'table' and card.gpu
    if gpu and not gpus[card.host .. gpu.index] then
      gpus[card.host .. gpu.index] = true
      if type(gpu.utilisation_percent) == 'number' then told, busy = told + 1, busy + gpu.utilisation_percent end
      if type(gpu.memory_used_mb) == 'number' then used = (used or 0) + gpu.memory_used_mb end
    end
  end
  return {workers = there, gpu_utilisation_percent = told > 0 and busy / told or nil, gpu_memory_used_mb = used}
end

local sample = workers()
sample.at, sample.counts = now, counters()
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
local disks = redis.call('HGETALL', K.DISKS)
for i = 1, #disks, 2 do
  if now - string.match(disks[i + 1], '%d+$') > K.DISK_TTL_S * 1000 then redis.call('HDEL', K.DISKS, disks[i]) end
end
return 1
