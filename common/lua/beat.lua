-- Renews the leases of all of a worker's runs, keeps its card and RQ's registration fresh, and says which runs to drop, and
-- whether an operator wants it to make room for a fresh one.
-- ARGV: worker, lease_ms, card (JSON), card_ttl_ms, rq_ttl_s, state (idle|busy), then id, fence …
-- Returns {registered (1|0), restart (1|0), 'ok'|'cancel'|'lost' …}
local worker, lease_ms = ARGV[1], tonumber(ARGV[2])
local now = now_ms()
redis.call('SET', K.CARD .. worker, ARGV[3], 'PX', ARGV[4])
redis.call('ZADD', K.WORKERS, now, worker)
local registration = K.RQ_WORKER .. worker
local registered = redis.call('EXISTS', registration)
if registered == 1 then
  redis.call('HSET', registration, 'last_heartbeat', iso(now), 'state', ARGV[6])
  redis.call('EXPIRE', registration, ARGV[5])
end
local verdicts = {registered, redis.call('EXISTS', K.RESTART .. worker)}
for i = 7, #ARGV, 2 do
  local id = ARGV[i]
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'fence', 'cancel', 'worker')
  if r[1] ~= 'running' or r[2] ~= ARGV[i + 1] or r[4] ~= worker then
    verdicts[#verdicts + 1] = 'lost'
  else
    redis.call('ZADD', K.LEASES, now + lease_ms, id)
    verdicts[#verdicts + 1] = r[3] and 'cancel' or 'ok'
  end
end
return verdicts
