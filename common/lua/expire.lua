-- Ends queued tasks whose deadline has passed, so that nobody waits for them until a worker is free.
-- ARGV: retention_ms, limit
-- Returns {{id, request_id} …} of the tasks that expired
local now = now_ms()
local expired = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.DEADLINES, 0, now, 'LIMIT', 0, ARGV[2])) do
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'queue', 'model', 'priority', 'tenant', 'request_id')
  redis.call('ZREM', K.DEADLINES, id)
  if r[1] == 'queued' then
    leave_queue(id, r[2], r[3], r[4], r[5])
    expire(id, r[2], now, tonumber(ARGV[1]))
    expired[#expired + 1] = {id, r[6] or ''}
  end
end
return expired
