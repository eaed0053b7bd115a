-- Ends queued tasks whose deadline has passed, so that nobody waits for them until a worker is free.
-- ARGV: retention_ms, limit
-- Returns {{id, request_id} …} of the tasks that expired, by whichever script, and have been told of by nobody yet
local now = now_ms()
for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.DEADLINES, 0, now, 'LIMIT', 0, ARGV[2])) do
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'queue', 'model', 'priority', 'tenant')
  redis.call('ZREM', K.DEADLINES, id)
  if r[1] == 'queued' then
    leave_queue(id, r[2], r[3], r[4], r[5])
    expire(id, r[2], now, tonumber(ARGV[1]))
  end
end

local told = {}
while #told < tonumber(ARGV[2]) do
  local id = redis.call('LPOP', K.EXPIRED)
  if not id then break end
  told[#told + 1] = {id, redis.call('HGET', K.TASK .. id, 'request_id') or ''}
end
return told
