-- Cancels a task: gone at once while it is queued, flagged while it runs (its worker stops it at the next step).
-- ARGV: id, tenant ('' any), retention_ms, token (new for each cancel, the same when re-sent)
-- Returns 'canceled' | 'flagged' | 'final' | 'unknown'
local id = ARGV[1]
local r = redis.call('HMGET', K.TASK .. id, 'status', 'tenant', 'queue', 'model', 'priority', 'cancel_token')
if not r[1] or ARGV[2] ~= '' and r[2] ~= ARGV[2] then return 'unknown' end
if r[1] == 'running' then
  redis.call('HSET', K.TASK .. id, 'cancel', 1)
  return 'flagged'
end
if r[1] == 'canceled' and r[6] == ARGV[4] then return 'canceled' end
if r[1] ~= 'queued' then return 'final' end
redis.call('HSET', K.TASK .. id, 'cancel_token', ARGV[4])
leave_queue(id, r[3], r[4], r[5], r[2])
settle(id, r[3], 'canceled', '', now_ms(), tonumber(ARGV[3]))
return 'canceled'
