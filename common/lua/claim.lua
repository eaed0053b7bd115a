-- Takes tasks for a worker until `room` pictures are reached: priority first, then by model, then fair share among tenants,
-- then FIFO. A task leaves its queue, gets its fence and its lease in one go: there is no in-between to be lost in.
-- Models of one priority: first those that would have to be loaded and whose oldest task has waited past the bound, then
-- those in memory, then, if the worker holds nothing, the others; always the one with the oldest task. A claim takes tasks
-- of one model at most that has to be loaded, and none of a lower priority than what it left standing. Tasks with more
-- pixels than the worker has memory for are not seen at all: they are for others, and hold up nothing behind them.
-- ARGV: worker, gpu, token (new for each claim, the same when re-sent), room, lease_ms, retention_ms, bound_ms,
--       busy (1|0: whether the worker holds tasks), number of models in memory, then model, most pixels ('' for no
--       limit) … (those in memory first)
-- Returns {'suspended'|'ok', {model whose bell it rang …},
--          {id, fence, queue, queued_ms, deadline_in_ms, request, request_id, alone (1|0)} …}
local worker, gpu, token, room = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local lease_ms, retention_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local bound_ms, busy = tonumber(ARGV[7]), ARGV[8] == '1'
local models, resident, most = {}, {}, {}
for m = 10, #ARGV, 2 do
  models[#models + 1] = ARGV[m]
  resident[ARGV[m]] = #models <= tonumber(ARGV[9])
  most[ARGV[m]] = tonumber(ARGV[m + 1])
end
local PRIORITIES = {'high', 'normal', 'low'}
local MOST_TENANTS = 64 -- that are looked at for the oldest task of a line
local LOOK_AT = 16 -- tenants of a line, and tasks of each, among which a worker looks for what it has memory for
local now = now_ms()

local function describe(id, fence)
  local r = redis.call('HMGET', K.TASK .. id, 'queue', 'created_at', 'deadline_at', 'request', 'request_id', 'alone')
  local deadline = tonumber(r[3])
  return {id, fence, r[1], now - r[2], deadline > 0 and math.max(1, deadline - now) or 0, r[4], r[5],
    r[6] and 1 or 0}
end

local last = redis.call('GET', K.CLAIM .. worker)
if last then
  local claim = cjson.decode(last)
  if claim.token == token then
    local again = {'ok', {}}
    for _, run in ipairs(claim.runs) do
      local r = redis.call('HMGET', K.TASK .. run[1], 'status', 'fence', 'worker')
      if r[1] == 'running' and tonumber(r[2]) == run[2] and r[3] == worker then
        redis.call('ZADD', K.LEASES, now + lease_ms, run[1])
        again[#again + 1] = describe(run[1], run[2])
      end
    end
    return again
  end
end
if redis.call('EXISTS', K.RQ_SUSPENDED) == 1 then return {'suspended', {}} end
if redis.call('EXISTS', K.DEAD .. worker) == 1 then return {'ok', {}} end -- sent before it died, and heard after its burial

local function take(id, queue)
  local key = K.TASK .. id
  local fence = redis.call('HINCRBY', key, 'fence', 1)
  redis.call('HSET', key, 'status', 'running', 'worker', worker, 'started_at', now, 'step', 0, 'attempt:' .. fence,
    cjson.encode({worker = worker, gpu = gpu, started_at = now}))
  redis.call('ZADD', K.LEASES, now + lease_ms, id)
  redis.call('ZREM', K.DEADLINES, id)
  -- +inf keeps RQ's own janitor off a run that our leases watch, while its counts stay right
  redis.call('ZADD', K.RQ_STARTED .. queue, '+inf', id .. ':' .. fence)
  redis.call('HSET', K.RQ_JOB .. id, 'status', 'started', 'started_at', iso(now), 'worker_name', worker)
  publish(id, 'running', 0, redis.call('HGET', key, 'steps'))
  return fence
end

-- A job that nobody submitted here: never run, kept where RQ's tools show it.
local function refuse(id, queue)
  redis.call('HSET', K.RQ_JOB .. id, 'status', 'failed', 'ended_at', iso(now), 'exc_info', 'not a zfleet task')
  redis.call('PEXPIREAT', K.RQ_JOB .. id, now + retention_ms)
  redis.call('ZADD', K.RQ_FAILED .. queue, math.floor((now + retention_ms) / 1000), id)
end

-- The first task of a queue with so many pixels at most, if one is near its head. What has no record fits anywhere.
local function first_fitting(queue, pixels)
  for _, id in ipairs(redis.call('LRANGE', K.RQ_QUEUE .. queue, 0, LOOK_AT - 1)) do
    if tonumber(redis.call('HGET', K.TASK .. id, 'pixels') or 0) <= pixels then return id end
  end
end

local function pop(queue, pixels)
  if not pixels then return redis.call('LPOP', K.RQ_QUEUE .. queue) end
  local id = first_fitting(queue, pixels)
  if id then redis.call('LREM', K.RQ_QUEUE .. queue, 1, id) end
  return id
end

-- Pops the tenant's next live task; returns id, cost and number of pictures, or nil when there is none to pop.
local function next_task(queue, pixels)
  while true do
    local id = pop(queue, pixels)
    if not id then return nil end
    local r = redis.call('HMGET', K.TASK .. id, 'status', 'deadline_at', 'cost', 'n')
    if not r[1] then
      refuse(id, queue)
    elseif r[1] == 'queued' then
      local deadline = tonumber(r[2])
      if deadline > 0 and deadline <= now then
        expire(id, queue, now, retention_ms)
      else
        return id, tonumber(r[3]), tonumber(r[4])
      end
    end
  end
end

local answer, runs = {'ok', {}}, {}

-- Takes the next task of the tenant whose turn it is; returns whether there was one.
local function serve_tenant(line, tenant, start, pixels)
  local queue = line .. '.' .. tenant
  local id, cost, pictures = next_task(queue, pixels)
  if id then
    -- start-time fair queueing with equal shares: a tenant's next start is this one's virtual finish
    redis.call('HSET', K.CLOCK, line, start)
    redis.call('HSET', K.TAGS .. line, tenant, start + cost)
    redis.call('ZADD', K.READY .. line, start + cost, tenant)
    local fence = take(id, queue)
    room = room - pictures
    runs[#runs + 1] = {id, fence}
    answer[#answer + 1] = describe(id, fence)
  end
  if redis.call('LLEN', K.RQ_QUEUE .. queue) == 0 then redis.call('ZREM', K.READY .. line, tenant) end
  return id
end

-- Takes the next task of a line; returns whether the line may have more.
local function serve(line, pixels)
  local first = redis.call('ZRANGE', K.READY .. line, 0, pixels and LOOK_AT - 1 or 0, 'WITHSCORES')
  for i = 1, #first, 2 do
    local served = serve_tenant(line, first[i], tonumber(first[i + 1]), pixels)
    if not pixels then return true end
    if served then -- who is passed over, as its tasks are too large, falls behind nobody, nor behind the clock
      for j = 1, i - 2, 2 do redis.call('ZADD', K.READY .. line, 'XX', first[i + 1], first[j]) end
      return true
    end
  end
  return false
end

-- When the oldest task of a line was submitted; nil for a line with none. With one model there is nothing to compare.
local function oldest(line, pixels)
  if #models == 1 then return now end
  local tenants = redis.call('ZRANGE', K.READY .. line, 0, (pixels and LOOK_AT or MOST_TENANTS) - 1)
  local since
  for _, tenant in ipairs(tenants) do
    local queue, id = line .. '.' .. tenant, nil
    if pixels then
      id = first_fitting(queue, pixels)
    else
      id = redis.call('LINDEX', K.RQ_QUEUE .. queue, 0)
    end
    if id or not pixels then since = since or now end
    local created = id and redis.call('HGET', K.TASK .. id, 'created_at')
    if created then since = math.min(since, created) end
  end
  return since
end

local to_load -- the model that the worker has to load for what it was given

local function rank(model, since)
  if to_load then return model == to_load and 1 or nil end
  if resident[model] then return 2 end
  if now - since > bound_ms then return 1 end
  return not busy and 3 or nil
end

-- The model to take from next, by when the oldest task of each was submitted; nil if all are left for later.
local function choose(since)
  local best, best_rank
  for _, model in ipairs(models) do
    local own = since[model] and rank(model, since[model])
    if own and (not best or own < best_rank or own == best_rank and since[model] < since[best]) then
      best, best_rank = model, own
    end
  end
  return best
end

-- Takes tasks of one priority; returns when the oldest task was submitted of each model that it left.
local function take_from(priority)
  local since = {}
  for _, model in ipairs(models) do since[model] = oldest(model .. '.' .. priority, most[model]) end
  local model = choose(since)
  while room > 0 and model do
    local line, before = model .. '.' .. priority, #runs
    since[model] = serve(line, most[model]) and oldest(line, most[model]) or nil
    if #runs > before then
      busy = true
      if not resident[model] then to_load = model end
    end
    model = choose(since)
  end
  return since
end

-- The bell rings for what others may take: what is too large for this worker, and whatever is there once it is full. What
-- stands behind a task that it left on purpose is not rung for: it would hear that itself, and leave it again.
local left = {}
for _, priority in ipairs(PRIORITIES) do
  local since = room > 0 and take_from(priority) or {}
  for _, model in ipairs(models) do
    if not left[model] and (room <= 0 or since[model] or most[model]) then
      left[model] = redis.call('EXISTS', K.READY .. model .. '.' .. priority) == 1
    end
  end
  if room > 0 and next(since) then break end
end
for _, model in ipairs(models) do
  if left[model] then
    ring(model)
    table.insert(answer[2], model)
  end
end
if #runs > 0 then
  redis.call('SET', K.CLAIM .. worker, cjson.encode({token = token, runs = runs}), 'EX', K.CLAIM_TTL_S)
  if redis.call('EXISTS', K.RQ_WORKER .. worker) == 1 then
    -- no current_job: a worker here has several, and rq-dashboard would read that job as pickle and fail
    redis.call('HSET', K.RQ_WORKER .. worker, 'state', 'busy')
  end
end
return answer
