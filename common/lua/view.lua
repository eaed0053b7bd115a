-- Reads a task in one go. Changes nothing, unless it stood in its queue until its deadline: then it ends here at last.
-- ARGV: id, retention_ms
-- Returns {fields and values of the record, position (-1 when not queued), pace of its model ('' unknown)} | nil
local id = ARGV[1]
local r = redis.call('HMGET', K.TASK .. id, 'status', 'queue', 'model', 'priority', 'tenant', 'deadline_at')
if not r[1] then return false end
local position, deadline = -1, tonumber(r[6])
if r[1] == 'queued' and deadline > 0 and deadline <= now_ms() then
  leave_queue(id, r[2], r[3], r[4], r[5])
  expire(id, r[2], now_ms(), tonumber(ARGV[2]))
elseif r[1] == 'queued' then
  position = redis.call('LPOS', K.RQ_QUEUE .. r[2], id) or 0
  for _, priority in ipairs({'high', 'normal'}) do
    if priority == r[4] then break end
    position = position + redis.call('LLEN', K.RQ_QUEUE .. r[3] .. '.' .. priority .. '.' .. r[5])
  end
end
return {redis.call('HGETALL', K.TASK .. id), position, redis.call('HGET', K.PACE, r[3]) or ''}
