-- Steps that the couriers' transitions share. A delivery is a field of its task's record (`delivery:<name>`, JSON: event,
-- state, tries, fence, made_at, and where there are: courier, next_at, last_at, last_status, last_error), and goes with it.

-- Reads a delivery by its id, <task>-<name>; nil where there is none.
local function find(delivery)
  local id, name = string.match(delivery, '^(.+)%-(ended)$')
  if not id then id, name = string.match(delivery, '^(.+)%-(started%-%d+)$') end
  local r = redis.call('HMGET', K.TASK .. (id or ''), 'delivery:' .. (name or ''), 'tenant', 'request_id')
  if not r[1] then return nil end
  return {delivery = delivery, id = id, field = 'delivery:' .. name, tenant = r[2], queue = K.WEBHOOK_QUEUE .. r[2],
    is = cjson.decode(r[1]), request_id = r[3] or ''}
end

local function keep(found)
  redis.call('HSET', K.TASK .. found.id, found.field, cjson.encode(found.is))
end

-- Ends the try that is under way.
local function end_try(found)
  redis.call('ZREM', K.RQ_STARTED .. found.queue, found.delivery .. ':' .. found.is.fence)
  found.is.courier = nil
end

local function queue_again(found, now, push)
  keep(found)
  queue_delivery(found.delivery, found.id, found.tenant, now, push)
end

-- Settles a delivery for good. `state` is delivered or failed.
local function close(found, state, now, retention_ms)
  local registry = (state == 'delivered' and K.RQ_FINISHED or K.RQ_FAILED) .. found.queue
  local expires = now + retention_ms
  found.is.state = state
  found.is.next_at = nil
  keep(found)
  redis.call('ZREM', K.DELIVERIES, found.delivery)
  redis.call('HSET', K.RQ_JOB .. found.delivery, 'status', state == 'delivered' and 'finished' or 'failed', 'ended_at', iso(now))
  if found.is.last_error then redis.call('HSET', K.RQ_JOB .. found.delivery, 'exc_info', found.is.last_error) end
  redis.call('PEXPIREAT', K.RQ_JOB .. found.delivery, expires)
  redis.call('ZREMRANGEBYSCORE', registry, 0, math.floor(now / 1000))
  redis.call('ZADD', registry, math.floor(expires / 1000), found.delivery)
end
