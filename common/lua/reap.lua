-- Takes back the runs of a dead worker, or those whose lease ran out: to the head of their queue. One crash is counted
-- for each suspect, which from then on runs alone; a task that has used up its crashes is quarantined as failed. Those that
-- stood by will run alone too, so that next time there is no doubt.
-- After a time in which nobody could reap, as Redis was away or stood still, nobody could beat either: then leases get one
-- more term before any of them counts as run out.
-- ARGV: worker ('' for every lease that ran out: then all are suspects), crash_limit, retention_ms, lease_ms, gap_ms, limit,
--       crashed (1|0: whether the worker has died unasked), number of suspects, suspect id …, bystander id …
-- Returns {{id, fence, 'requeued'|'given_back'|'quarantined'|'canceled', worker, request_id} …}
local worker, crash_limit, retention_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local ids
if worker == '' then
  local last = tonumber(redis.call('GET', K.REAPED) or '0')
  redis.call('SET', K.REAPED, string.format('%d', now))
  if now - last > tonumber(ARGV[5]) then redis.call('SET', K.REAP_GRACE, '1', 'PX', ARGV[4]) end
  if redis.call('EXISTS', K.REAP_GRACE) == 1 then return {} end
  ids = redis.call('ZRANGEBYSCORE', K.LEASES, 0, now, 'LIMIT', 0, ARGV[6])
else
  ids = redis.call('ZRANGE', K.LEASES, 0, -1)
end

local suspects, bystanders = {}, {}
for i = 9, #ARGV do
  local which = i < 9 + tonumber(ARGV[8]) and suspects or bystanders
  which[ARGV[i]] = true
end

local reaped = {}
for _, id in ipairs(ids) do
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'fence', 'queue', 'model', 'priority', 'tenant', 'cancel',
    'worker', 'request_id')
  if r[1] ~= 'running' then
    redis.call('ZREM', K.LEASES, id)
  elseif worker == '' or r[8] == worker then
    local suspect, crashes = worker == '' or suspects[id], 0
    if suspect then crashes = redis.call('HINCRBY', K.TASK .. id, 'crashes', 1) end
    if suspect or bystanders[id] then redis.call('HSET', K.TASK .. id, 'alone', 1) end
    end_attempt(id, r[3], r[2], worker == '' and 'lost' or suspect and 'crashed' or 'released', now)
    if r[7] then
      settle(id, r[3], 'canceled', '', now, retention_ms)
      reaped[#reaped + 1] = {id, tonumber(r[2]), 'canceled', r[8], r[9] or ''}
    elseif crashes >= crash_limit then
      local error = {code = 'worker_crashed', message = 'its worker died or fell silent ' .. crashes .. ' times while running it',
        retryable = false}
      settle(id, r[3], 'failed', cjson.encode(error), now, retention_ms)
      reaped[#reaped + 1] = {id, tonumber(r[2]), 'quarantined', r[8], r[9] or ''}
    else
      requeue(id, r[4], r[5], r[6], r[3])
      reaped[#reaped + 1] = {id, tonumber(r[2]), suspect and 'requeued' or 'given_back', r[8], r[9] or ''}
    end
  end
end
local outcomes, more = {}, {}
for _, run in ipairs(reaped) do outcomes[run[3]] = (outcomes[run[3]] or 0) + 1 end
for outcome, runs in pairs(outcomes) do
  more[#more + 1], more[#more + 2] = 'reaped|' .. outcome, runs
end
if ARGV[7] == '1' and redis.call('EXISTS', K.DEAD .. worker) == 0 then
  more[#more + 1], more[#more + 2] = 'crashes', 1
end
if more[1] then count(more) end
if worker ~= '' then
  local queues = redis.call('HGET', K.RQ_WORKER .. worker, 'queues')
  for queue in string.gmatch(queues or '', '[^,]+') do
    redis.call('SREM', K.RQ_WORKERS_OF .. queue, K.RQ_WORKER .. worker)
  end
  for _, list in ipairs(redis.call('SMEMBERS', K.RQ_QUEUES)) do -- it may have learnt of tenants since it was registered
    redis.call('SREM', K.RQ_WORKERS_OF .. string.sub(list, #K.RQ_QUEUE + 1), K.RQ_WORKER .. worker)
  end
  redis.call('SREM', K.RQ_WORKERS, K.RQ_WORKER .. worker)
  redis.call('DEL', K.RQ_WORKER .. worker)
  redis.call('DEL', K.CARD .. worker, K.CLAIM .. worker)
  redis.call('SET', K.DEAD .. worker, '1', 'EX', K.DEAD_TTL_S)
  redis.call('ZREM', K.WORKERS, worker)
end
return reaped
