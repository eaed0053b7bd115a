-- Ends queued tasks whose deadline has passed, so that nobody waits for them until a worker is free.
-- ARGV: retention_ms, limit
-- Returns the ids of the tasks that expired
local now = now_ms()
local expired = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.DEADLINES, 0, now, 'LIMIT', 0, ARGV[2])) do
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'queue', 'model', 'priority', 'tenant')
  redis.call('ZREM', K.DEADLINES, id)
  if r[1] == 'queued' then
    redis.call('LREM', K.RQ_QUEUE .. r[2], 1, id)
    if redis.call('LLEN', K.RQ_QUEUE .. r[2]) == 0 then redis.call('ZREM', K.READY .. r[3] .. '.' .. r[4], r[5]) end
    expire(id, r[2], now, tonumber(ARGV[1]))
    expired[#expired + 1] = id
  end
end
return expired
