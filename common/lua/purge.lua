-- Removes failed and expired tasks with all that Redis holds of them: record, RQ job, places in lists and registries, and
-- webhooks that have not been told yet. What is anything else by now is left as it is.
-- ARGV: id, queue …
-- Returns {{id, images (JSON), attempt number, attempt (JSON) …} …} of those that had a record

-- Removes what RQ's tools show of a webhook's delivery, and its place in line.
local function drop(id, tenant, field, text)
  local delivery, queue = id .. '-' .. string.sub(field, #'delivery:' + 1), K.WEBHOOK_QUEUE .. tenant
  redis.call('ZREM', K.DELIVERIES, delivery)
  redis.call('LREM', K.RQ_QUEUE .. queue, 0, delivery)
  redis.call('ZREM', K.RQ_STARTED .. queue, delivery .. ':' .. cjson.decode(text).fence)
  for _, registry in ipairs({K.RQ_SCHEDULED, K.RQ_FINISHED, K.RQ_FAILED}) do redis.call('ZREM', registry .. queue, delivery) end
  redis.call('DEL', K.RQ_JOB .. delivery)
end

local purged = {}
for i = 1, #ARGV, 2 do
  local id, queue = ARGV[i], ARGV[i + 1]
  local r = redis.call('HMGET', K.TASK .. id, 'status', 'tenant', 'images')
  if not r[1] or r[1] == 'failed' or r[1] == 'expired' then
    redis.call('ZREM', K.RQ_FAILED .. queue, id)
    redis.call('DEL', K.RQ_JOB .. id)
  end
  if r[1] == 'failed' or r[1] == 'expired' then
    local row, record = {id, r[3] or '[]'}, redis.call('HGETALL', K.TASK .. id)
    for k = 1, #record, 2 do
      local fence = string.match(record[k], '^attempt:(%d+)$')
      if fence then
        row[#row + 1] = fence
        row[#row + 1] = record[k + 1]
      elseif string.find(record[k], 'delivery:', 1, true) == 1 then
        drop(id, r[2], record[k], record[k + 1])
      end
    end
    redis.call('ZREM', K.TENANT_TASKS .. r[2], id)
    redis.call('ZREM', K.TENANT_TASKS .. '*', id)
    redis.call('DEL', K.TASK .. id)
    publish(id, r[1]) -- so that nobody goes on answering from memory
    purged[#purged + 1] = row
  end
end
return purged
