-- Puts back every open task that stands in no queue and no lease, as after a lost tail of writes or `rq empty`; has every
-- tenant with a queue stand in line, and counts as running only what runs.
-- ARGV: grace_ms (younger tasks are left alone), every_ms (nothing is done if it was done less long ago; 0: always),
--       retention_ms
-- Returns {{id, request_id} …} of the tasks put back
if ARGV[2] ~= '0' and not redis.call('SET', K.RECONCILED, '1', 'NX', 'PX', ARGV[2]) then return {} end
local now = now_ms()
local standing, read = {}, {}
local function stands(id, queue)
  if not read[queue] then
    for _, member in ipairs(redis.call('LRANGE', K.RQ_QUEUE .. queue, 0, -1)) do standing[member] = true end
    read[queue] = true
  end
  return standing[id]
end

for _, key in ipairs(redis.call('SMEMBERS', K.API_KEYS)) do
  for _, id in ipairs(redis.call('SMEMBERS', K.RUNNING_OF .. key)) do
    if redis.call('HGET', K.TASK .. id, 'status') ~= 'running' then redis.call('SREM', K.RUNNING_OF .. key, id) end
  end
end

local back = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.OPEN, 0, now - ARGV[1])) do
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'queue', 'model', 'priority', 'tenant', 'fence', 'cancel',
    'request_id')
  if r[1] == 'queued' then
    if not stands(id, r[2]) then
      requeue(id, r[3], r[4], r[5], r[2])
      back[#back + 1] = {id, r[8] or ''}
    elseif make_ready(r[3], r[4], r[5]) then
      ring(r[3])
    end
  elseif r[1] == 'running' then
    if not redis.call('ZSCORE', K.LEASES, id) then
      end_attempt(id, r[2], r[6], 'lost', now)
      if r[7] then
        settle(id, r[2], 'canceled', '', now, tonumber(ARGV[3]))
      else
        requeue(id, r[3], r[4], r[5], r[2])
        back[#back + 1] = {id, r[8] or ''}
      end
    end
  else
    redis.call('ZREM', K.OPEN, id)
  end
end
return back
