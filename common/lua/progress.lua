-- Notes how far each run is, if its fence still holds, and tells the listeners.
-- ARGV: worker, then id, fence, step, steps, preview (base64, '' no new one) …
-- Returns {'ok'|'cancel'|'lost' …}
local verdicts = {}
for i = 2, #ARGV, 5 do
  local id = ARGV[i]
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'fence', 'cancel', 'worker')
  if r[1] ~= 'running' or r[2] ~= ARGV[i + 1] or r[4] ~= ARGV[1] then
    verdicts[#verdicts + 1] = 'lost'
  else
    redis.call('HSET', K.TASK .. id, 'step', ARGV[i + 2])
    if ARGV[i + 4] ~= '' then redis.call('HSET', K.TASK .. id, 'preview', ARGV[i + 4]) end
    publish(id, 'progress', ARGV[i + 2], ARGV[i + 3])
    verdicts[#verdicts + 1] = r[3] and 'cancel' or 'ok'
  end
end
return verdicts
