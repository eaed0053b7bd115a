-- Ends a try of a delivery that the courier has under way.
-- ARGV: id, courier, fence, outcome: delivered | failed (for good) | again (after the pause) | back (it was no try),
--       HTTP status of the answer ('' none), what went wrong ('' nothing), pause_ms, retention_ms
-- Returns 'ok' | 'lost' (another courier may have it by now; or this was sent twice)
local found, now = find(ARGV[1]), now_ms()
if not found or found.is.courier ~= ARGV[2] or found.is.fence ~= tonumber(ARGV[3]) then return 'lost' end
local d, outcome = found.is, ARGV[4]
end_try(found)
if outcome == 'back' then
  d.tries = d.tries - 1
  queue_again(found, now, 'LPUSH')
  return 'ok'
end
d.last_status = tonumber(ARGV[5])
d.last_error = ARGV[6] ~= '' and ARGV[6] or nil
if outcome ~= 'again' then
  close(found, outcome, now, tonumber(ARGV[8]))
  return 'ok'
end
d.next_at = now + tonumber(ARGV[7])
keep(found)
redis.call('ZADD', K.DELIVERIES, d.next_at, found.delivery)
redis.call('ZADD', K.RQ_SCHEDULED .. found.queue, math.ceil(d.next_at / 1000), found.delivery)
redis.call('HSET', K.RQ_JOB .. found.delivery, 'status', 'scheduled', 'worker_name', '')
return 'ok'
