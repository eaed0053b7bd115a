-- Gives a run back unharmed, as on a drain: to the head of its queue, with no crash counted.
-- ARGV: id, fence, retention_ms, worker
-- Returns 'ok' | 'canceled' (its owner had asked for that) | 'lost'
local id, fence = ARGV[1], ARGV[2]
local r = redis.call('HMGET', K.TASK .. id, 'status', 'fence', 'queue', 'model', 'priority', 'tenant', 'cancel',
  'worker')
if r[1] ~= 'running' or r[2] ~= fence or r[8] ~= ARGV[4] then return 'lost' end
local now = now_ms()
if r[7] then
  end_attempt(id, r[3], fence, 'canceled', now)
  settle(id, r[3], 'canceled', '', now, tonumber(ARGV[3]))
  return 'canceled'
end
end_attempt(id, r[3], fence, 'released', now)
requeue(id, r[4], r[5], r[6], r[3])
return 'ok'
