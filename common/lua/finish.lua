-- Ends a run: succeeded, failed or canceled. The first writer wins: the fence must match and the state not be final.
-- ARGV: id, fence, status, images (JSON), error (JSON or ''), warnings (JSON), stages (JSON), busy_ms, retention_ms, worker,
--       picture_ms (that one of its pictures was in the making), fuse (the limit that stopped it, or ''), 'again' for an end
--       that was agreed to, and that Redis may have forgotten together with the claim before it
-- Returns 'ok' | 'already' (sent twice) | 'lost' (another attempt has the task, or it is final)
local LATELY, LATELY_OF_ALL = 5, 20 -- tasks that a mean looks back on; a model's has to see its whole mix of sizes
local WITHIN = {0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, '+Inf'} -- bounds of the errors' histogram

-- Keeps the pace of a size, ms for a unit of cost, and of the model: ms and cost of a picture, whatever its size.
local function learn(model, pixels, cost, ms)
  if ms <= 0 then return end
  local function mean(field, new, lately)
    local before = redis.call('HGET', K.PACE, model .. field) or new
    redis.call('HSET', K.PACE, model .. field, before + (new - before) / lately)
  end
  local seen = redis.call('HINCRBY', K.PACE, model .. ':seen', 1)
  mean(':' .. size_of(pixels), ms / cost, LATELY)
  mean(':ms', ms, math.min(seen, LATELY_OF_ALL))
  mean(':cost', cost, math.min(seen, LATELY_OF_ALL))
end

-- Counts how far off the estimate was that the submit was answered with, as a share of the time that it took.
local function note_error(model, estimated, took)
  local error = math.abs(took - estimated) / math.max(1, took)
  for _, bound in ipairs(WITHIN) do
    if bound == '+Inf' or error <= bound then
      redis.call('HINCRBY', K.ETA_ERRORS, model .. ':' .. bound, 1)
      break
    end
  end
  redis.call('HINCRBYFLOAT', K.ETA_ERRORS, model .. ':sum', error)
end

-- What a task that succeeded counts for: its pictures, its time from submit to end, and the stages that took any.
local function made(model, n, took)
  local more = {'images|' .. model, n}
  observe(more, 'took|' .. model, took, K.SECONDS)
  for name, ms in pairs(cjson.decode(ARGV[7])) do
    local stage = string.match(name, '^(%l+)_ms$')
    if stage and ms > 0 then observe(more, table.concat({'stage', model, stage}, '|'), ms, K.STAGE_SECONDS) end
  end
  return more
end

local id, fence, status = ARGV[1], ARGV[2], ARGV[3]
local r = redis.call('HMGET', K.TASK .. id, 'status', 'fence', 'queue', 'steps', 'worker', 'model', 'priority', 'tenant')
local now = now_ms()
if ARGV[13] == 'again' and r[1] == status and redis.call('HGET', K.TASK .. id, 'images') == ARGV[4] then return 'already' end
if ARGV[13] == 'again' and (r[1] == 'queued' or r[1] == 'running' and (r[2] ~= fence or r[5] ~= ARGV[10])) then
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
  announce(id, 'started', now, fence)
  r[5] = ARGV[10]
elseif r[2] ~= fence or r[5] ~= ARGV[10] then
  return 'lost'
elseif r[1] ~= 'running' then
  return r[1] == status and 'already' or 'lost'
end
local counted = {}
redis.call('HSET', K.TASK .. id, 'images', ARGV[4], 'warnings', ARGV[6], 'stages', ARGV[7])
if status == 'succeeded' then
  redis.call('HSET', K.TASK .. id, 'step', r[4])
  local done = redis.call('HMGET', K.TASK .. id, 'pixels', 'cost', 'n', 'created_at', 'eta')
  learn(r[6], done[1], done[2] / done[3], tonumber(ARGV[11]))
  if done[5] then note_error(r[6], tonumber(done[5]), now - done[4]) end
  counted = made(r[6], done[3], now - done[4])
elseif ARGV[12] ~= '' then
  counted = {'fuses|' .. ARGV[12], 1}
end
end_attempt(id, r[3], fence, status, now)
settle(id, r[3], status, ARGV[5], now, tonumber(ARGV[9]), counted)
local registration = K.RQ_WORKER .. r[5]
if redis.call('EXISTS', registration) == 1 then
  if status ~= 'canceled' then
    redis.call('HINCRBY', registration, status == 'failed' and 'failed_job_count' or 'successful_job_count', 1)
  end
  redis.call('HINCRBYFLOAT', registration, 'total_working_time', tonumber(ARGV[8]) / 1000)
end
return 'ok'
