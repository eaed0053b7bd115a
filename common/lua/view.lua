-- Reads a task in one go. Changes nothing, unless it stood in its queue until its deadline: then it ends here at last.
-- ARGV: id, retention_ms, slots (JSON, of each model that is served)
-- Returns {fields and values of the record, position (-1 when not queued), eta_ms ('' unknown)} | nil
local id, now = ARGV[1], now_ms()
local r = redis.call('HMGET', K.TASK .. id, 'status', 'queue', 'model', 'priority', 'tenant', 'deadline_at', 'cost', 'n', 'pixels',
  'step', 'steps')
if not r[1] then return false end
local own = {model = r[3], priority = r[4], tenant = r[5], cost = tonumber(r[7]), n = tonumber(r[8]), pixels = tonumber(r[9])}
local position, deadline, eta = -1, tonumber(r[6]), nil
if r[1] == 'queued' and deadline > 0 and deadline <= now then
  leave_queue(id, r[2], r[3], r[4], r[5])
  expire(id, r[2], now, tonumber(ARGV[2]))
elseif r[1] == 'queued' then
  local before = ahead(own, redis.call('LPOS', K.RQ_QUEUE .. r[2], id) or 0)
  position, eta = before.tasks, eta_ms(own, before, cjson.decode(ARGV[3])[own.model], now)
elseif r[1] == 'running' then
  local run = run_ms(own, cjson.decode(ARGV[3])[own.model])
  eta = run and run * (1 - r[10] / math.max(1, r[11]))
end
return {redis.call('HGETALL', K.TASK .. id), position, eta and math.ceil(eta) or ''}
