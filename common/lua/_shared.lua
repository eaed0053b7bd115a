-- Steps that several transitions share. link.py puts the key table K and _line.lua in front of this file, and this file in
-- front of each script. A script runs atomically; it names its arguments on top and may be sent twice without harm.

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Milliseconds since 1970 as RQ writes timestamps; days to date after Howard Hinnant's civil_from_days.
local function iso(ms)
  local seconds = math.floor(ms / 1000)
  local z = math.floor(seconds / 86400) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03d000Z', year, month, day,
    math.floor(seconds / 3600) % 24, math.floor(seconds / 60) % 60, seconds % 60, ms % 1000)
end

local REGISTRY = {succeeded = K.RQ_FINISHED, failed = K.RQ_FAILED, expired = K.RQ_FAILED, canceled = K.RQ_CANCELED}
local RQ_STATUS = {succeeded = 'finished', failed = 'failed', expired = 'failed', canceled = 'canceled'}

local function publish(id, event, step, steps)
  local channel = RQ_STATUS[event] and K.ENDS or K.STEPS
  redis.call('PUBLISH', channel, id .. ' ' .. event .. ' ' .. (step or 0) .. ' ' .. (steps or 0))
end

-- One token wakes one worker that waits; a worker that leaves tasks behind rings again for the next.
local function ring_at(bell)
  if redis.call('LLEN', bell) == 0 then
    redis.call('RPUSH', bell, '1')
    redis.call('EXPIRE', bell, K.BELL_TTL_S)
  end
end

local function ring(model)
  ring_at(K.BELL .. model)
end

-- The tenant stands in line for its share: never before the virtual clock, so that idling earns no credit. Returns whether it
-- did not stand there.
local function make_ready(model, priority, tenant)
  local line = model .. '.' .. priority
  local clock = tonumber(redis.call('HGET', K.CLOCK, line) or '0')
  local tag = tonumber(redis.call('ZSCORE', K.TAGS .. line, tenant) or '0')
  return redis.call('ZADD', K.READY .. line, 'NX', math.max(clock, tag), tenant) == 1
end

-- A key may have room for another run: who waits for that stands in line again.
local function unpark(key)
  for _, queue in ipairs(redis.call('SMEMBERS', K.PARKED .. key)) do
    local model, priority, tenant = string.match(queue, '^(.-)%.(.-)%.(.*)$')
    if redis.call('EXISTS', K.RQ_QUEUE .. queue) == 1 and make_ready(model, priority, tenant) then ring(model) end
  end
  redis.call('DEL', K.PARKED .. key)
end

-- Ends the running attempt in the record, the started registry, the leases and the runs of its key.
local function end_attempt(id, queue, fence, outcome, now)
  local field = 'attempt:' .. fence
  local r = redis.call('HMGET', K.TASK .. id, field, 'key')
  if r[1] then
    local attempt = cjson.decode(r[1])
    attempt.ended_at = now
    attempt.outcome = outcome
    redis.call('HSET', K.TASK .. id, field, cjson.encode(attempt))
  end
  redis.call('HDEL', K.TASK .. id, 'preview')
  redis.call('ZREM', K.RQ_STARTED .. queue, id .. ':' .. fence)
  redis.call('ZREM', K.LEASES, id)
  if r[2] and redis.call('SREM', K.RUNNING_OF .. r[2], id) == 1 then unpark(r[2]) end
  over(id)
end

-- Puts a task that ran back to the head of its queue.
local function requeue(id, model, priority, tenant, queue)
  redis.call('HSET', K.TASK .. id, 'status', 'queued', 'worker', '', 'step', 0)
  redis.call('HSET', K.RQ_JOB .. id, 'status', 'queued', 'worker_name', '')
  enter(id, queue)
  redis.call('LPUSH', K.RQ_QUEUE .. queue, id)
  local deadline = tonumber(redis.call('HGET', K.TASK .. id, 'deadline_at') or '0')
  if deadline > 0 then redis.call('ZADD', K.DEADLINES, deadline, id) end
  make_ready(model, priority, tenant)
  publish(id, 'queued')
  ring(model)
end

-- Puts a delivery into its tenant's queue, at the tail (RPUSH) or the head (LPUSH), and wakes a courier.
local function queue_delivery(delivery, task_id, tenant, now, push)
  local queue = K.WEBHOOK_QUEUE .. tenant
  redis.call('HSETNX', K.RQ_JOB .. delivery, 'created_at', iso(now))
  redis.call('HSET', K.RQ_JOB .. delivery, 'enqueued_at', iso(now), 'origin', queue, 'status', 'queued', 'timeout', -1,
    'data', '["zfleet.webhook", null, ["' .. delivery .. '"], {}]', 'description', 'webhook of task ' .. task_id)
  redis.call('SADD', K.RQ_QUEUES, K.RQ_QUEUE .. queue)
  redis.call(push, K.RQ_QUEUE .. queue, delivery)
  redis.call('ZADD', K.DELIVERIES, '+inf', delivery)
  redis.call('ZADD', K.TO_DELIVER, 'NX', now, tenant)
  ring_at(K.DELIVER_BELL)
end

-- Has a task's webhook told of this event, if it asked for that: once of the end, and of each attempt's start.
local function announce(id, event, now, fence)
  local r = redis.call('HMGET', K.TASK .. id, 'webhook', 'tenant')
  if not string.find(r[1] or '', event, 1, true) then return end
  local name = fence and event .. '-' .. fence or event
  local delivery = {event = event, state = 'pending', tries = 0, fence = 0, made_at = now, next_at = now}
  if redis.call('HSETNX', K.TASK .. id, 'delivery:' .. name, cjson.encode(delivery)) == 1 then
    queue_delivery(id .. '-' .. name, id, r[2], now, 'RPUSH')
  end
end

-- Makes a task final. The caller has checked that it is not. `error` is JSON or ''; `counted` what else is to be counted.
local function settle(id, queue, status, error, now, retention_ms, counted)
  local expires = now + retention_ms
  local gone = now + K.TOMBSTONE_FACTOR * retention_ms
  redis.call('HSET', K.TASK .. id, 'status', status, 'finished_at', now, 'expires_at', expires)
  redis.call('HSET', K.RQ_JOB .. id, 'status', RQ_STATUS[status], 'ended_at', iso(now))
  if error ~= '' then
    redis.call('HSET', K.TASK .. id, 'error', error)
    redis.call('HSET', K.RQ_JOB .. id, 'exc_info', cjson.decode(error).code)
  end
  redis.call('PEXPIREAT', K.TASK .. id, gone)
  redis.call('PEXPIREAT', K.RQ_JOB .. id, expires)
  redis.call('ZREM', K.OPEN, id)
  redis.call('ZREM', K.DEADLINES, id)
  local registry = REGISTRY[status] .. queue
  redis.call('ZREMRANGEBYSCORE', registry, 0, math.floor(now / 1000))
  redis.call('ZADD', registry, math.floor(expires / 1000), id)
  local more = counted or {}
  more[#more + 1] = 'tasks|' .. string.match(queue, '^[^.]+') .. '|' .. status
  more[#more + 1] = 1
  count(more)
  announce(id, 'ended', now)
  publish(id, status)
end

-- Takes a task out of its queue. What stood behind it may be of a key that has room.
local function leave_queue(id, queue, model, priority, tenant)
  leave(id, queue, redis.call('LREM', K.RQ_QUEUE .. queue, 1, id) > 0)
  if redis.call('EXISTS', K.RQ_QUEUE .. queue) == 0 then
    redis.call('ZREM', K.READY .. model .. '.' .. priority, tenant)
  elseif make_ready(model, priority, tenant) then
    ring(model)
  end
end

-- Ends a queued task that nobody began in time; expire.lua has it told. The caller has taken it out of its queue.
local function expire(id, queue, now, retention_ms)
  local error = {code = 'deadline_exceeded', message = 'the deadline passed before a worker was free', retryable = true}
  settle(id, queue, 'expired', cjson.encode(error), now, retention_ms)
  if redis.call('LLEN', K.EXPIRED) < K.EXPIRED_MOST then redis.call('RPUSH', K.EXPIRED, id) end
end
