-- Takes tasks for a worker until `room` pictures are reached: priority first, then by model, then fair share among tenants,
-- then FIFO. A task leaves its queue, gets its fence and its lease in one go: there is no in-between to be lost in.
-- Fair share is start-time fair queueing (Goyal, Vin, Cheng 1996), weighted: a tenant's next task starts, in virtual time, at
-- the start of its last one + cost / share, and the least start goes first. A worker of several models shares itself out over
-- all of them: what it gives a tenant counts in the lines of all its models, whose virtual times it keeps in step.
-- Models of one priority: first those that would have to be loaded and whose oldest task has waited past the bound, then
-- those in memory, then, if the worker holds nothing, the others; among equals the one whose first tenant has the least
-- virtual start, or the older task. A claim takes tasks of one model at most that has to be loaded, and none of a lower
-- priority than what it left standing.
-- Ageing: when AGEING_EVERY tasks of higher priorities have been started in a row over a line whose next task has waited for
-- ageing_ms, that one has its turn.
-- Not seen at all are tasks with more pixels than the worker has memory for, and those of an API key that has as many on GPUs
-- as it may: they hold up nothing behind them, as far as LOOK_AT. A tenant with none but the latter there is parked until
-- one of those ends.
-- ARGV: worker, gpu, token (new for each claim, the same when re-sent), room, lease_ms, retention_ms, bound_ms, ageing_ms,
--       busy (1|0: whether the worker holds tasks), number of models in memory, then model, most pixels ('' for no
--       limit) … (those in memory first)
-- Returns {'suspended'|'ok', {model whose bell it rang …},
--          {id, fence, queue, queued_ms, deadline_in_ms, request, request_id, alone (1|0), traceparent ('' none), ms since
--           it last came into line, which only a traced one tells apart from queued_ms} …}
local worker, gpu, token, room = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local lease_ms, retention_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local bound_ms, ageing_ms, busy = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9] == '1'
local models, resident, most = {}, {}, {}
for m = 11, #ARGV, 2 do
  models[#models + 1] = ARGV[m]
  resident[ARGV[m]] = #models <= tonumber(ARGV[10])
  most[ARGV[m]] = tonumber(ARGV[m + 1])
end
local PRIORITIES = {'high', 'normal', 'low'}
local MOST_TENANTS = 64 -- that are looked at for the oldest task of a line
local LOOK_AT = 16 -- tasks of a tenant among which a worker looks for one that it may take …
local MOST_SEEN = 512 -- … and of all the tenants of a line that it passes over for that
local AGEING_EVERY = 10
local now = now_ms()

local function describe(id, fence)
  local r = redis.call('HMGET', K.TASK .. id, 'queue', 'created_at', 'deadline_at', 'request', 'request_id', 'alone',
    'traceparent')
  local deadline, since = tonumber(r[3]), r[2]
  local before = r[7] and redis.call('HGET', K.TASK .. id, 'attempt:' .. fence - 1)
  if before then since = cjson.decode(before).ended_at or since end
  return {id, fence, r[1], now - r[2], deadline > 0 and math.max(1, deadline - now) or 0, r[4], r[5],
    r[6] and 1 or 0, r[7] or '', now - since}
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
if redis.call('SISMEMBER', K.DRAINED, string.match(worker, '^(.+)%.[^.]*$') or worker) == 1 then
  for _, model in ipairs(models) do -- it may have heard a bell that was rung for another
    for _, priority in ipairs(PRIORITIES) do
      if redis.call('EXISTS', K.READY .. model .. '.' .. priority) == 1 then ring(model) end
    end
  end
  return {'suspended', {}}
end
if redis.call('EXISTS', K.DEAD .. worker) == 1 then return {'ok', {}} end -- sent before it died, and heard after its burial

local function take(id, queue, api_key, created)
  local key = K.TASK .. id
  local fence = redis.call('HINCRBY', key, 'fence', 1)
  redis.call('HSET', key, 'status', 'running', 'worker', worker, 'started_at', now, 'step', 0, 'attempt:' .. fence,
    cjson.encode({worker = worker, gpu = gpu, started_at = now}))
  redis.call('ZADD', K.LEASES, now + lease_ms, id)
  redis.call('ZREM', K.DEADLINES, id)
  if api_key ~= '' then redis.call('SADD', K.RUNNING_OF .. api_key, id) end
  begin(id, room, now)
  -- +inf keeps RQ's own janitor off a run that our leases watch, while its counts stay right
  redis.call('ZADD', K.RQ_STARTED .. queue, '+inf', id .. ':' .. fence)
  redis.call('HSET', K.RQ_JOB .. id, 'status', 'started', 'started_at', iso(now), 'worker_name', worker)
  if fence == 1 then -- what it waited after that was no line's fault
    local waited = {}
    observe(waited, 'waited|' .. string.match(queue, '^[^.]+'), now - created, K.SECONDS)
    count(waited)
  end
  announce(id, 'started', now, fence)
  publish(id, 'running', 0, redis.call('HGET', key, 'steps'))
  return fence
end

-- A job that nobody submitted here: never run, kept where RQ's tools show it.
local function refuse(id, queue)
  redis.call('HSET', K.RQ_JOB .. id, 'status', 'failed', 'ended_at', iso(now), 'exc_info', 'not a zfleet task')
  redis.call('PEXPIREAT', K.RQ_JOB .. id, now + retention_ms)
  redis.call('ZADD', K.RQ_FAILED .. queue, math.floor((now + retention_ms) / 1000), id)
end

-- Whether a task stands in its queue by right. One that does not leaves it: what nobody submitted here, what has moved on,
-- and what is past its deadline.
local function stands(id, queue, status, deadline)
  local late = status == 'queued' and deadline > 0 and deadline <= now
  if status == 'queued' and not late then return true end
  leave(id, queue, redis.call('LREM', K.RQ_QUEUE .. queue, 1, id) > 0)
  if not status then refuse(id, queue) end
  if late then expire(id, queue, now, retention_ms) end
  return false
end

local function at_limit(api_key)
  local limit = api_key ~= '' and tonumber(redis.call('HGET', K.API_KEY .. api_key, 'max_running') or '')
  return limit and redis.call('SCARD', K.RUNNING_OF .. api_key) >= limit
end

-- The first task near the head of a queue that this worker may take; or nil, and the keys at their limit whose tasks alone
-- stand there.
local function next_task(queue, pixels)
  local left, large, full
  repeat
    left, large, full = false, false, {}
    for _, id in ipairs(redis.call('LRANGE', K.RQ_QUEUE .. queue, 0, LOOK_AT - 1)) do
      local r = redis.call('HMGET', K.TASK .. id, 'status', 'deadline_at', 'pixels', 'key', 'cost', 'n', 'created_at')
      local api_key = r[4] or ''
      if not stands(id, queue, r[1], tonumber(r[2] or 0)) then
        left = true
      elseif pixels and tonumber(r[3] or 0) > pixels then
        large = true
      elseif at_limit(api_key) then
        full[#full + 1] = api_key
      else
        return {id = id, key = api_key, cost = tonumber(r[5]), pictures = tonumber(r[6]), created = tonumber(r[7])}
      end
    end
  until not left
  return nil, large and {} or full
end

-- The tenant whose turn it is in a line, with the task and its virtual start, in the line's own time and in that of all; nil
-- if there is none for this worker. Tenants without work, or none that may be run, leave the line; others are passed over.
local function look(model, priority)
  local line, passed_over, seen = model .. '.' .. priority, {}, 0
  while seen < MOST_SEEN do
    local first = redis.call('ZRANGE', K.READY .. line, #passed_over, #passed_over, 'WITHSCORES')
    if not first[1] then return nil end
    local tenant, start, queue = first[1], tonumber(first[2]), line .. '.' .. first[1]
    local task, full = next_task(queue, most[model])
    if task then
      local lead = tonumber(redis.call('HGET', K.LEAD, line) or 0)
      return {model = model, line = line, tenant = tenant, queue = queue, task = task, start = start, lead = lead,
        at = start + lead, passed_over = passed_over}
    elseif redis.call('EXISTS', K.RQ_QUEUE .. queue) == 0 then
      redis.call('ZREM', K.READY .. line, tenant)
    elseif full[1] then
      redis.call('ZREM', K.READY .. line, tenant)
      for _, api_key in ipairs(full) do redis.call('SADD', K.PARKED .. api_key, queue) end
    else
      passed_over[#passed_over + 1] = tenant
      seen = seen + math.min(LOOK_AT, redis.call('LLEN', K.RQ_QUEUE .. queue))
    end
  end
end

local function look_at_all(priority)
  local found = {}
  for _, model in ipairs(models) do found[model] = look(model, priority) end
  return found
end

local oldest = {} -- line -> when its oldest task was submitted, as far as this claim has had to know

local function waits_since(turn)
  local since = oldest[turn.line] or turn.task.created
  if not oldest[turn.line] then
    for _, tenant in ipairs(redis.call('ZRANGE', K.READY .. turn.line, 0, MOST_TENANTS - 1)) do
      local task = next_task(turn.line .. '.' .. tenant, most[turn.model])
      if task then since = math.min(since, task.created) end
    end
    oldest[turn.line] = since
  end
  return since
end

local to_load -- the model that the worker has to load for what it was given

local function rank(turn)
  if to_load then return turn.model == to_load and 1 or nil end
  if resident[turn.model] then return 2 end
  if #models > 1 and now - waits_since(turn) > bound_ms then return 1 end
  return not busy and 3 or nil
end

local function clock_of(line)
  return tonumber(redis.call('HGET', K.CLOCK, line) or 0)
end

-- Orders the turns of lines that stand to choose from. Where other workers have served a line beyond what waits in the one
-- before it, its time is set back to right behind that: so no line has arrears to catch up on while another stands still.
local function in_step(turns)
  table.sort(turns, function(a, b)
    if a.at ~= b.at then return a.at < b.at end
    if a.task.created ~= b.task.created then return a.task.created < b.task.created end
    return a.place < b.place
  end)
  for i = 2, #turns do
    local turn = turns[i]
    local ahead = clock_of(turn.line) + turn.lead - turns[i - 1].at - QUANTUM
    if ahead > 0 then
      turn.lead, turn.at = turn.lead - ahead, turn.at - ahead
      redis.call('HSET', K.LEAD, turn.line, turn.lead)
    end
  end
end

-- A tenant's tasks of several models go by age: the oldest of those with which it would start now.
local function eldest(turn, turns)
  local first = turn
  for _, other in ipairs(turns) do
    local start = other ~= turn and redis.call('ZSCORE', K.READY .. other.line, turn.tenant)
    if start and start + other.lead == turn.at then
      local queue = other.line .. '.' .. turn.tenant
      local task = next_task(queue, most[other.model])
      if task and task.created < first.task.created then
        first = {model = other.model, line = other.line, tenant = turn.tenant, queue = queue, task = task, at = turn.at}
      end
    end
  end
  return first
end

-- The turn to serve next, of one for each model that has any; nil if all are left for later.
local function choose(found)
  local best, turns = nil, {}
  for place, model in ipairs(models) do
    local own = found[model] and rank(found[model])
    if own and (not best or own < best) then best, turns = own, {} end
    if own and own == best then
      found[model].place = place
      turns[#turns + 1] = found[model]
    end
  end
  in_step(turns)
  return turns[1] and eldest(turns[1], turns)
end

-- Counts in one line what its tenant was given in another or in this one, and moves the line's clock there. `turn` is whose
-- turn it was in this line, if anybody's; `later` is by how much its next task starts after this one.
local function account(line, turn, served, later)
  if not turn and redis.call('EXISTS', K.READY .. line) == 1 then return end -- all too large: other workers serve it
  local lead = turn and turn.lead or tonumber(redis.call('HGET', K.LEAD, line) or 0)
  local start = math.min(served.at - lead, turn and turn.start or math.huge)
  for i, tenant in ipairs(turn and turn.passed_over or {}) do -- they keep their order, and fall behind nobody
    redis.call('ZADD', K.READY .. line, 'XX', 'GT', start + (i - 1) * QUANTUM, tenant)
  end
  redis.call('ZADD', K.TAGS .. line, 'GT', start + later, served.tenant)
  redis.call('ZADD', K.READY .. line, 'XX', 'GT', start + later, served.tenant)
  local clock = math.max(clock_of(line), start)
  redis.call('HSET', K.CLOCK, line, clock)
  redis.call('ZREMRANGEBYSCORE', K.TAGS .. line, '-inf', clock)
end

local LOWER = {high = {'normal', 'low'}, normal = {'low'}, low = {}}

-- Remembers over whom of a lower priority a task was started.
local function pass(turn, priority)
  redis.call('HDEL', K.PASSED, turn.line)
  for _, lower in ipairs(LOWER[priority]) do
    for _, model in ipairs(models) do
      local line = model .. '.' .. lower
      if redis.call('EXISTS', K.READY .. line) == 1 then redis.call('HINCRBY', K.PASSED, line, 1) end
    end
  end
end

local answer, runs = {'ok', {}}, {}

-- Takes the task of a turn; `found` has the turns of all lines of that priority.
local function serve(turn, found, priority)
  local task, queue = turn.task, turn.queue
  local cost = charge(task.cost, tonumber(redis.call('HGET', K.SHARES, turn.tenant) or 1))
  for _, model in ipairs(models) do account(model .. '.' .. priority, found[model], turn, cost) end
  leave(task.id, queue, redis.call('LREM', K.RQ_QUEUE .. queue, 1, task.id) > 0)
  if redis.call('EXISTS', K.RQ_QUEUE .. queue) == 0 then redis.call('ZREM', K.READY .. turn.line, turn.tenant) end
  pass(turn, priority)
  local fence = take(task.id, queue, task.key, task.created)
  room, busy, oldest[turn.line] = room - task.pictures, true, nil
  if not resident[turn.model] then to_load = turn.model end
  runs[#runs + 1] = {task.id, fence}
  answer[#answer + 1] = describe(task.id, fence)
end

-- A turn of a lower priority that is due by its age, with the turns of all lines of its priority, and that.
local function overdue(priority)
  for _, lower in ipairs(LOWER[priority]) do
    local due, found = {}, nil
    for _, model in ipairs(models) do
      local passed = tonumber(redis.call('HGET', K.PASSED, model .. '.' .. lower) or 0)
      if passed >= AGEING_EVERY then
        found = found or look_at_all(lower)
        local turn = found[model]
        if turn and now - turn.task.created > ageing_ms then due[model] = turn end
      end
    end
    local turn = choose(due)
    if turn then return turn, found, lower end
  end
end

-- Takes tasks of one priority, and of lower ones what is due; returns whose turn it is next of each model that it left.
local function take_from(priority)
  while room > 0 do
    local found = look_at_all(priority)
    local turn = choose(found)
    if not turn then return found end
    local late, others, lower = overdue(priority)
    if late then
      serve(late, others, lower)
    else
      serve(turn, found, priority)
    end
  end
  return {}
end

-- The bell rings for what others may take: what is too large for this worker, and whatever is there once it is full. What
-- stands behind a task that it left on purpose is not rung for: it would hear that itself, and leave it again.
local left = {}
for _, priority in ipairs(PRIORITIES) do
  local standing = take_from(priority)
  for _, model in ipairs(models) do
    if not left[model] and (room <= 0 or standing[model] or most[model]) then
      left[model] = redis.call('EXISTS', K.READY .. model .. '.' .. priority) == 1
    end
  end
  if room > 0 and next(standing) then break end
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
