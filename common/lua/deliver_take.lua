-- Takes deliveries for a courier, of the tenants in turn. First those come back into line whose next try is due, or whose
-- courier has fallen silent: a lease that ran out was a try. A delivery leaves its queue and gets its fence and its lease
-- in one go.
-- ARGV: courier, token (new for each take, the same when re-sent), room, most of one tenant, most tries, lease_ms,
--       retention_ms, then tenant, how many of it the courier has under way …
-- Returns {whether some are left in line (1|0), {id, task id, event, fence, tries with this one, tenant, made_at, request_id} …}
local courier, token, room, most = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local lease_ms, retention_ms = tonumber(ARGV[6]), tonumber(ARGV[7])
local LOOK_AT = 500 -- that are due; a courier comes again at once
local now = now_ms()

local function row(found)
  local d = found.is
  return {found.delivery, found.id, d.event, d.fence, d.tries, found.tenant, d.made_at, found.request_id}
end

local last = redis.call('GET', K.DELIVER_TAKEN .. courier)
if last and cjson.decode(last).token == token then
  local again = {redis.call('EXISTS', K.TO_DELIVER)}
  for _, delivery in ipairs(cjson.decode(last).taken) do
    local found = find(delivery)
    if found and found.is.courier == courier then again[#again + 1] = row(found) end
  end
  return again
end

-- Its task's record is gone, as it is after twice the retention: nobody could be told of anything.
local function forget(delivery)
  local queue = redis.call('HGET', K.RQ_JOB .. delivery, 'origin') or ''
  redis.call('ZREM', K.RQ_SCHEDULED .. queue, delivery)
  redis.call('ZREM', K.DELIVERIES, delivery)
  redis.call('DEL', K.RQ_JOB .. delivery)
end

for _, delivery in ipairs(redis.call('ZRANGEBYSCORE', K.DELIVERIES, 0, now, 'LIMIT', 0, LOOK_AT)) do
  local found = find(delivery)
  if not found then
    forget(delivery)
  elseif not found.is.courier then
    redis.call('ZREM', K.RQ_SCHEDULED .. found.queue, delivery)
    queue_again(found, now, 'RPUSH')
  else
    end_try(found)
    found.is.last_error = 'whoever was to tell it fell silent'
    if found.is.tries < tonumber(ARGV[5]) then
      queue_again(found, now, 'LPUSH')
    else
      close(found, 'failed', now, retention_ms)
    end
  end
end

local held, at_most = {}, 0 -- at_most: how many tenants have as many under way as they may
local function hold(tenant, count)
  held[tenant] = (held[tenant] or 0) + count
  if held[tenant] >= most then at_most = at_most + 1 end
end
for i = 8, #ARGV, 2 do hold(ARGV[i], tonumber(ARGV[i + 1])) end

local function whose_turn()
  for _, tenant in ipairs(redis.call('ZRANGE', K.TO_DELIVER, 0, at_most)) do
    if (held[tenant] or 0) < most then return tenant end
  end
end

-- A job that stands for no delivery: never looked into, kept where RQ's tools show it.
local function refuse(delivery, queue)
  redis.call('HSET', K.RQ_JOB .. delivery, 'status', 'failed', 'ended_at', iso(now), 'exc_info', 'not a zfleet webhook')
  redis.call('PEXPIREAT', K.RQ_JOB .. delivery, now + retention_ms)
  redis.call('ZADD', K.RQ_FAILED .. queue, math.floor((now + retention_ms) / 1000), delivery)
end

local function take(found)
  local d = found.is
  d.courier, d.fence, d.tries, d.last_at, d.next_at = courier, d.fence + 1, d.tries + 1, now, nil
  keep(found)
  redis.call('ZREM', K.RQ_SCHEDULED .. found.queue, found.delivery) -- where RQ's own scheduler was faster
  redis.call('ZADD', K.DELIVERIES, now + lease_ms, found.delivery)
  -- +inf keeps RQ's own janitor off, as with tasks
  redis.call('ZADD', K.RQ_STARTED .. found.queue, '+inf', found.delivery .. ':' .. d.fence)
  redis.call('HSET', K.RQ_JOB .. found.delivery, 'status', 'started', 'started_at', iso(now), 'worker_name', courier)
end

local taken, answer = {}, {0}
local tenant = room > 0 and whose_turn()
while tenant and #taken < room do
  local queue = K.WEBHOOK_QUEUE .. tenant
  local delivery = redis.call('LPOP', K.RQ_QUEUE .. queue)
  local found = delivery and find(delivery)
  if found and found.queue == queue and found.is.state == 'pending' and not found.is.courier then
    take(found)
    taken[#taken + 1] = delivery
    answer[#answer + 1] = row(found)
    hold(tenant, 1)
    redis.call('ZADD', K.TO_DELIVER, now + #taken / 1000, tenant)
  elseif delivery and not found then
    refuse(delivery, queue)
  end
  if redis.call('LLEN', K.RQ_QUEUE .. queue) == 0 then redis.call('ZREM', K.TO_DELIVER, tenant) end
  tenant = whose_turn()
end
answer[1] = redis.call('EXISTS', K.TO_DELIVER)
if answer[1] == 1 then ring_at(K.DELIVER_BELL) end -- for another courier
if #taken > 0 then
  redis.call('SET', K.DELIVER_TAKEN .. courier, cjson.encode({token = token, taken = taken}), 'EX', K.CLAIM_TTL_S)
end
return answer
