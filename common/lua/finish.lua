-- Ends a run: succeeded, failed or canceled. The first writer wins: the fence must match and the state not be final.
-- ARGV: id, fence, status, images (JSON), error (JSON or ''), warnings (JSON), stages (JSON), busy_ms, retention_ms, worker,
--       'again' for an end that was agreed to, and that Redis may have forgotten together with the claim before it
-- Returns 'ok' | 'already' (sent twice) | 'lost' (another attempt has the task, or it is final)
local id, fence, status = ARGV[1], ARGV[2], ARGV[3]
local r = redis.call('HMGET', K.TASK .. id, 'status', 'fence', 'queue', 'steps', 'worker', 'model', 'priority', 'tenant')
local now = now_ms()
if ARGV[11] == 'again' and r[1] == status and redis.call('HGET', K.TASK .. id, 'images') == ARGV[4] then return 'already' end
if ARGV[11] == 'again' and (r[1] == 'queued' or r[1] == 'running' and (r[2] ~= fence or r[5] ~= ARGV[10])) then
  -- clients may have seen that end: whoever stands in line for it, or runs it now, comes too late
  if r[1] == 'queued' then
    leave_queue(id, r[3], r[6], r[7], r[8])
  else
    end_attempt(id, r[3], r[2], 'lost', now)
  end
  fence = tostring(redis.call('HINCRBY', K.TASK .. id, 'fence', 1))
  local attempt = {worker = ARGV[10], gpu = '', started_at = math.floor(now - ARGV[8])}
  redis.call('HSET', K.TASK .. id, 'worker', ARGV[10], 'started_at', attempt.started_at, 'attempt:' .. fence,
    cjson.encode(attempt))
  r[5] = ARGV[10]
elseif r[2] ~= fence or r[5] ~= ARGV[10] then
  return 'lost'
elseif r[1] ~= 'running' then
  return r[1] == status and 'already' or 'lost'
end
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
