-- Ends a run: succeeded, failed or canceled. The first writer wins: the fence must match and the state not be final.
-- ARGV: id, fence, status, images (JSON), error (JSON or ''), warnings (JSON), stages (JSON), busy_ms, retention_ms, worker
-- Returns 'ok' | 'already' (sent twice) | 'lost' (another attempt has the task, or it is final)
local id, fence, status = ARGV[1], ARGV[2], ARGV[3]
local r = redis.call('HMGET', K.TASK .. id, 'status', 'fence', 'queue', 'steps', 'worker', 'model')
if r[2] ~= fence or r[5] ~= ARGV[10] then return 'lost' end
if r[1] ~= 'running' then return r[1] == status and 'already' or 'lost' end

local now = now_ms()
redis.call('HSET', K.TASK .. id, 'images', ARGV[4], 'warnings', ARGV[6], 'stages', ARGV[7])
if status == 'succeeded' then
  redis.call('HSET', K.TASK .. id, 'step', r[4])
  local busy, before = tonumber(ARGV[8]), redis.call('HGET', K.PACE, r[6])
  redis.call('HSET', K.PACE, r[6], before and before + 0.2 * (busy - before) or busy)
end
end_attempt(id, r[3], fence, status, now)
settle(id, r[3], status, ARGV[5], now, tonumber(ARGV[9]))
local registration = K.RQ_WORKER .. r[5]
if redis.call('EXISTS', registration) == 1 then
  if status ~= 'canceled' then
    redis.call('HINCRBY', registration, status == 'failed' and 'failed_job_count' or 'successful_job_count', 1)
  end
  redis.call('HINCRBYFLOAT', registration, 'total_working_time', tonumber(ARGV[8]) / 1000)
end
return 'ok'
