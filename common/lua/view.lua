-- Reads a task in one go. Changes nothing.
-- ARGV: id
-- Returns {fields and values of the record, position (-1 when not queued), pace of its model ('' unknown)} | nil
local record = redis.call('HGETALL', K.TASK .. ARGV[1])
if #record == 0 then return false end
local r = redis.call('HMGET', K.TASK .. ARGV[1], 'status', 'queue', 'model', 'priority', 'tenant')
local position = -1
if r[1] == 'queued' then
  position = redis.call('LPOS', K.RQ_QUEUE .. r[2], ARGV[1]) or 0
  for _, priority in ipairs({'high', 'normal'}) do
    if priority == r[4] then break end
    position = position + redis.call('LLEN', K.RQ_QUEUE .. r[3] .. '.' .. priority .. '.' .. r[5])
  end
end
return {record, position, redis.call('HGET', K.PACE, r[3]) or ''}
