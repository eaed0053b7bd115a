-- Accepts a task: record, RQ job, queue, bell. The same id, or the same Idempotency-Key and body, is one task.
-- ARGV: id, tenant, model, priority, queue, cap, cost, retention_ms, deadline_ms (after now, 0 none), n, steps,
--       pixels (of one picture), request (JSON), request_id, job data (RQ), idempotency key ('' none), body hash,
--       'again' for a task that was accepted already, whatever the cap, and that Redis may have forgotten
-- Returns {'created'|'exists', id, position, pace of its model ('' unknown)} | {'full', depth} | {'conflict', id}
local id, tenant, model, priority, queue = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local cap, cost, retention_ms, deadline_ms = tonumber(ARGV[6]), ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])
local idempotency, body_hash = ARGV[16], ARGV[17]
local idempotency_key = K.IDEMPOTENCY .. tenant .. ':' .. idempotency

if idempotency ~= '' then
  local known = redis.call('HMGET', idempotency_key, 'id', 'body')
  if known[1] and redis.call('EXISTS', K.TASK .. known[1]) == 1 then
    if known[2] ~= body_hash then return {'conflict', known[1]} end
    return {'exists', known[1], 0, ''}
  end
end
if redis.call('EXISTS', K.TASK .. id) == 1 then return {'exists', id, 0, ''} end

local list = K.RQ_QUEUE .. queue
local depth = redis.call('LLEN', list)
if depth >= cap and ARGV[18] ~= 'again' then return {'full', depth} end

local now = now_ms()
local deadline = deadline_ms > 0 and now + deadline_ms or 0
redis.call('HSET', K.TASK .. id, 'id', id, 'tenant', tenant, 'model', model, 'priority', priority, 'queue', queue,
  'cost', cost, 'n', ARGV[10], 'steps', ARGV[11], 'pixels', ARGV[12], 'request', ARGV[13], 'request_id', ARGV[14], 'status', 'queued',
  'fence', 0, 'crashes', 0, 'step', 0, 'created_at', now, 'deadline_at', deadline)
redis.call('HSET', K.RQ_JOB .. id, 'created_at', iso(now), 'enqueued_at', iso(now), 'data', ARGV[15], 'origin', queue,
  'description', model .. ' task ' .. id, 'status', 'queued', 'timeout', -1)
redis.call('SADD', K.RQ_QUEUES, list)
redis.call('RPUSH', list, id)
redis.call('ZADD', K.OPEN, now, id)
if deadline > 0 then redis.call('ZADD', K.DEADLINES, deadline, id) end
local mine = K.TENANT_TASKS .. tenant
redis.call('ZADD', mine, now, id)
redis.call('ZREMRANGEBYSCORE', mine, 0, now - K.TOMBSTONE_FACTOR * retention_ms)
redis.call('PEXPIRE', mine, K.TOMBSTONE_FACTOR * retention_ms)
if idempotency ~= '' then
  redis.call('HSET', idempotency_key, 'id', id, 'body', body_hash)
  redis.call('EXPIRE', idempotency_key, K.IDEMPOTENCY_TTL_S)
end
make_ready(model, priority, tenant)
ring(model)
return {'created', id, depth, redis.call('HGET', K.PACE, model) or ''}
