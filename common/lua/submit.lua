-- Accepts a task: record, RQ job, queue, bell. The same id, or the same Idempotency-Key and body, is one task.
-- ARGV: id, task (JSON: tenant, key, model, priority, queue, cost, n, steps, pixels, request_id, deadline_ms after now or 0,
--       idempotency key or '', body_hash, webhook, retry_of or '', traceparent or ''), request (JSON), job data (RQ),
--       bounds (JSON: queue_cap, fleet_cap, max_queued of the key or null, in_time: whether to refuse what would be late,
--       slots of each model that is served), retention_ms,
--       'again' for a task that was accepted already, whatever the bounds, and that Redis may have forgotten
-- Returns {'created'|'exists', id, position, eta_ms ('' unknown)} | {'conflict', id} | {'full', 'queue'|'fleet', tasks}
--         | {'quota', tasks, ms until the first of them in this line may begin ('' unknown)} | {'late', eta_ms}
local id, task, bounds, retention_ms = ARGV[1], cjson.decode(ARGV[2]), cjson.decode(ARGV[5]), tonumber(ARGV[6])
local again = ARGV[7] == 'again'
local idempotency_key = K.IDEMPOTENCY .. task.tenant .. ':' .. task.idempotency

if task.idempotency ~= '' then
  local known = redis.call('HMGET', idempotency_key, 'id', 'body')
  if known[1] and redis.call('EXISTS', K.TASK .. known[1]) == 1 then
    if known[2] ~= task.body_hash then return {'conflict', known[1]} end
    return {'exists', known[1], 0, ''}
  end
end
if redis.call('EXISTS', K.TASK .. id) == 1 then return {'exists', id, 0, ''} end

local list = K.RQ_QUEUE .. task.queue
local depth, now = redis.call('LLEN', list), now_ms()
local slots = bounds.slots[task.model]
local before = ahead(task, depth)
local eta = eta_ms(task, before, slots, now)

local function refusal()
  if depth >= bounds.queue_cap then return {'full', 'queue', depth} end
  local open = redis.call('ZCARD', K.OPEN)
  if open >= bounds.fleet_cap then return {'full', 'fleet', open} end
  local waiting = type(bounds.max_queued) == 'number' and redis.call('SCARD', K.QUEUED_OF .. task.key)
  if waiting and waiting >= bounds.max_queued then
    local turn = wait_ms(task, ahead(task, 0), slots, now)
    return {'quota', waiting, turn and math.ceil(turn) or ''}
  end
  if bounds.in_time and eta and eta > task.deadline_ms then return {'late', math.ceil(eta)} end
end
local refused = not again and refusal()
if refused then return refused end

local deadline = task.deadline_ms > 0 and now + task.deadline_ms or 0
redis.call('HSET', K.TASK .. id, 'id', id, 'tenant', task.tenant, 'key', task.key, 'model', task.model,
  'priority', task.priority, 'queue', task.queue, 'cost', task.cost, 'n', task.n, 'steps', task.steps, 'pixels', task.pixels,
  'request', ARGV[3], 'request_id', task.request_id, 'webhook', task.webhook, 'status', 'queued', 'fence', 0, 'crashes', 0,
  'step', 0, 'created_at', now, 'deadline_at', deadline)
redis.call('HSET', K.RQ_JOB .. id, 'created_at', iso(now), 'enqueued_at', iso(now), 'data', ARGV[4], 'origin', task.queue,
  'description', task.model .. ' task ' .. id, 'status', 'queued', 'timeout', -1)
redis.call('SADD', K.RQ_QUEUES, list)
if eta then redis.call('HSET', K.TASK .. id, 'eta', eta) end
if task.retry_of ~= '' then
  redis.call('HSET', K.TASK .. id, 'retry_of', task.retry_of)
  if redis.call('EXISTS', K.TASK .. task.retry_of) == 1 then redis.call('HSET', K.TASK .. task.retry_of, 'retried_as', id) end
end
if (task.traceparent or '') ~= '' then redis.call('HSET', K.TASK .. id, 'traceparent', task.traceparent) end
enter(id, task.queue)
redis.call('RPUSH', list, id)
redis.call('ZADD', K.OPEN, now, id)
if deadline > 0 then redis.call('ZADD', K.DEADLINES, deadline, id) end
for _, whose in ipairs({task.tenant, '*'}) do
  local listed = K.TENANT_TASKS .. whose
  redis.call('ZADD', listed, now, id)
  redis.call('ZREMRANGEBYSCORE', listed, 0, now - K.TOMBSTONE_FACTOR * retention_ms)
  redis.call('PEXPIRE', listed, K.TOMBSTONE_FACTOR * retention_ms)
end
if task.idempotency ~= '' then
  redis.call('HSET', idempotency_key, 'id', id, 'body', task.body_hash)
  redis.call('EXPIRE', idempotency_key, K.IDEMPOTENCY_TTL_S)
end
count({'submitted|' .. task.model, 1})
make_ready(task.model, task.priority, task.tenant)
ring(task.model)
return {'created', id, before.tasks, eta and math.ceil(eta) or ''}
