-- Puts back every delivery that should stand in its queue and does not, as after `rq empty`.
-- ARGV: every_ms (nothing is done if it was done less long ago; 0: always)
-- Returns {{id, task id, request_id} …} of those put back
if ARGV[1] ~= '0' and not redis.call('SET', K.DELIVER_MENDED, '1', 'NX', 'PX', ARGV[1]) then return {} end

-- A look at each one holds up everybody, where a receiver that hangs has let a long line grow: only where the numbers
-- differ. What stands there without a right to is gone one day, and no longer hides one that is missing.
local in_line = 0
for _, tenant in ipairs(redis.call('ZRANGE', K.TO_DELIVER, 0, -1)) do
  in_line = in_line + redis.call('LLEN', K.RQ_QUEUE .. K.WEBHOOK_QUEUE .. tenant)
end
if in_line == redis.call('ZCOUNT', K.DELIVERIES, '+inf', '+inf') then return {} end

local now, standing, back = now_ms(), {}, {}
for _, delivery in ipairs(redis.call('ZRANGEBYSCORE', K.DELIVERIES, '+inf', '+inf')) do
  local found = find(delivery)
  if not found then
    redis.call('ZREM', K.DELIVERIES, delivery)
  else
    if not standing[found.queue] then
      standing[found.queue] = {}
      for _, member in ipairs(redis.call('LRANGE', K.RQ_QUEUE .. found.queue, 0, -1)) do standing[found.queue][member] = true end
    end
    if standing[found.queue][delivery] then
      redis.call('ZADD', K.TO_DELIVER, 'NX', now, found.tenant)
    else
      queue_again(found, now, 'RPUSH')
      back[#back + 1] = {delivery, found.id, found.request_id}
    end
  end
end
return back
