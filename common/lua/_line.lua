-- What stands in line and what runs: the books that are kept of it, who starts before a task, and how long that takes.
-- scripts.py puts this file in front of _shared.lua.
-- `slots` is what the live workers have for a model: {pictures that advance together, the same on one worker}, or nil.

local LINES = {'high', 'normal', 'low'}
local LOOKED_AT = 64 -- tenants of a line; where there are more, they are taken to be like these on average
local QUANTUM = 2 ^ -20 -- of virtual time: sums of its multiples are exact, so that equal starts compare as equal
local LEAST_SHARE = 1e-3 -- one of 0 would send the clock to infinity, and all who come after it
local ROUNDED = 1e-3 -- of a quantum, which a mean may be above what it stands for

-- The books

-- Of an entry in the books: cost, tasks, pictures.
local function read(entry)
  local cost, tasks, pictures = string.match(entry or '0 0 0', '(%S+) (%S+) (%S+)')
  return tonumber(cost), tonumber(tasks), tonumber(pictures)
end

local function book(queue, cost, tasks, pictures)
  redis.call('HSET', K.BACKLOG, queue, string.format('%.17g %d %d', cost, tasks, pictures))
end

-- A task is about to be pushed to its queue. Of an empty queue the books know nothing: `rq empty` tells nobody.
local function enter(id, queue)
  local r = redis.call('HMGET', K.TASK .. id, 'key', 'cost', 'n')
  local known = redis.call('EXISTS', K.RQ_QUEUE .. queue) == 1 and redis.call('HGET', K.BACKLOG, queue)
  local cost, tasks, pictures = read(known)
  book(queue, cost + r[2], tasks + 1, pictures + r[3])
  if r[1] and r[1] ~= '' then redis.call('SADD', K.QUEUED_OF .. r[1], id) end
end

-- A task waits no more: it has just been taken out of its queue, or, if it was not `found`, stood there no longer. What has
-- no record was never in the books.
local function leave(id, queue, found)
  local r = redis.call('HMGET', K.TASK .. id, 'key', 'cost', 'n')
  if redis.call('EXISTS', K.RQ_QUEUE .. queue) == 0 then
    redis.call('HDEL', K.BACKLOG, queue)
  elseif found and r[2] then
    local cost, tasks, pictures = read(redis.call('HGET', K.BACKLOG, queue))
    if tasks > 1 then book(queue, cost - r[2], tasks - 1, pictures - r[3]) end
  end
  if r[1] and r[1] ~= '' then redis.call('SREM', K.QUEUED_OF .. r[1], id) end
end

-- Sizes go by powers of two; a record of an earlier version lacks its own.
local function size_of(pixels)
  local _, exponent = math.frexp(pixels or 1)
  return exponent
end

-- Milliseconds that a picture of this task takes, by the pace of its size, else of its model; nil unknown.
local function picture_ms(model, pixels, cost, n)
  local r = redis.call('HMGET', K.PACE, model .. ':' .. size_of(pixels), model .. ':ms', model .. ':cost')
  local pace = r[1] or r[2] and r[2] / r[3]
  return pace and pace * cost / n
end

-- A task begins, on a worker with room for so many pictures: that many slots are taken until it is expected to end.
local function begin(id, room, now)
  local r = redis.call('HMGET', K.TASK .. id, 'model', 'pixels', 'cost', 'n')
  local n = tonumber(r[4])
  local taken = math.max(1, math.min(n, room))
  local due = K.DUE .. r[1]
  redis.call('ZREMRANGEBYSCORE', due, 0, now - K.OVERDUE_S * 1000) -- by a version that knew nothing of these books
  local at = math.floor(now + math.ceil(n / taken) * (picture_ms(r[1], r[2], r[3], n) or 0))
  for k = 1, taken do redis.call('ZADD', due, at, id .. ':' .. k) end
end

-- A task's run is over, whatever came of it.
local function over(id)
  local r = redis.call('HMGET', K.TASK .. id, 'model', 'n')
  for k = 1, tonumber(r[2] or 0) do redis.call('ZREM', K.DUE .. r[1], id .. ':' .. k) end
end

-- Who starts before

-- Byte by byte, as sorted sets have it; Lua's own < goes by the server's locale.
local function precedes(a, b)
  for i = 1, math.min(#a, #b) do
    if a:byte(i) ~= b:byte(i) then return a:byte(i) < b:byte(i) end
  end
  return #a < #b
end

-- Of each of these tenants' queues: tasks, mean cost, mean pictures and share. A task that is in no book counts like `own`.
local function queues_of(line, tenants, own)
  if #tenants == 0 then return {} end
  local names, queues = {}, {}
  for i, tenant in ipairs(tenants) do names[i] = line .. '.' .. tenant end
  local books = redis.call('HMGET', K.BACKLOG, unpack(names))
  local shares = redis.call('HMGET', K.SHARES, unpack(tenants))
  for i in ipairs(tenants) do
    local cost, tasks, pictures = read(books[i])
    if tasks == 0 then
      tasks = redis.call('LLEN', K.RQ_QUEUE .. names[i])
      cost, pictures = own.cost * tasks, own.n * tasks
    end
    queues[i] = {
      tasks = tasks, share = tonumber(shares[i] or 1), cost = tasks > 0 and cost / tasks or own.cost,
      pictures = tasks > 0 and pictures / tasks or own.n,
    }
  end
  return queues
end

-- How much later in virtual time than a task of this cost its tenant's next one starts (start-time fair queueing).
local function charge(cost, share)
  return math.max(1, math.ceil(cost / math.max(share, LEAST_SHARE) / QUANTUM - ROUNDED)) * QUANTUM
end

-- How many tasks of a queue whose first has the virtual start `first` start before the one of `tenant` at `start`.
local function earlier(queue, first, other, tenant, start)
  local gap = (start - first) / charge(queue.cost, queue.share)
  local tasks = precedes(other, tenant) and math.floor(gap) + 1 or math.ceil(gap)
  return math.max(0, math.min(queue.tasks, tasks))
end

-- Adds what other tenants' tasks start before the task, of `found` (tenant, virtual start …), of which there are `total`;
-- with no `start` all that stands there, whoever's it is.
local function add(sum, line, found, total, own, start)
  local tenants, firsts = {}, {}
  for i = 1, #found, 2 do
    if not start or found[i] ~= own.tenant then
      tenants[#tenants + 1], firsts[#firsts + 1] = found[i], found[i + 1]
    end
  end
  local more = #tenants > 0 and total / #tenants or 1
  for i, queue in ipairs(queues_of(line, tenants, own)) do
    local tasks = start and earlier(queue, firsts[i], tenants[i], own.tenant, start) or queue.tasks
    sum.tasks = sum.tasks + more * tasks
    sum.pictures = sum.pictures + more * tasks * queue.pictures
    sum.cost = sum.cost + more * tasks * queue.cost
  end
end

-- What starts before a task that stands at `index` of its queue, if nothing new comes: {tasks, pictures, cost}. That is
-- all of higher priorities, and in its own line what fair queueing puts before it. Exact where all tasks of a queue cost
-- the same, and no more tenants than LOOKED_AT stand in a line; else an estimate.
-- `own` has the task's model, priority, tenant, cost and n.
local function ahead(own, index)
  local sum = {tasks = 0, pictures = 0, cost = 0}
  for _, priority in ipairs(LINES) do
    local line = own.model .. '.' .. priority
    local ready = K.READY .. line
    if priority == own.priority then
      local mine = queues_of(line, {own.tenant}, own)[1]
      local ready_at = redis.call('ZSCORE', ready, own.tenant)
      local start = index * charge(mine.cost, mine.share) + (ready_at or math.max(
        redis.call('HGET', K.CLOCK, line) or 0, redis.call('ZSCORE', K.TAGS .. line, own.tenant) or 0))
      local found = redis.call('ZRANGEBYSCORE', ready, '-inf', start, 'WITHSCORES', 'LIMIT', 0, LOOKED_AT)
      local total = #found < 2 * LOOKED_AT and #found / 2 or redis.call('ZCOUNT', ready, '-inf', start)
      add(sum, line, found, total - (ready_at and 1 or 0), own, start)
      sum.tasks = math.floor(sum.tasks + 0.5) + index
      sum.pictures = sum.pictures + index * mine.pictures
      sum.cost = sum.cost + index * mine.cost
      return sum
    end
    local found = redis.call('ZRANGE', ready, 0, LOOKED_AT - 1, 'WITHSCORES')
    add(sum, line, found, #found < 2 * LOOKED_AT and #found / 2 or redis.call('ZCARD', ready), own)
  end
  return sum
end

-- How long that takes

-- Milliseconds that a task's own run takes; nil unknown. Pictures that one worker has no slots for take turns.
local function run_ms(own, slots)
  local each = slots and picture_ms(own.model, own.pixels, own.cost, own.n)
  return each and math.ceil(own.n / slots[2]) * each
end

-- Milliseconds until the last of a task's pictures begins (of those that one worker has slots for), with `sum` before it;
-- nil unknown. Each picture takes a slot. These free up in the order in which what runs is due, round after round.
local function wait_ms(own, sum, slots, now)
  local r = redis.call('HMGET', K.PACE, own.model .. ':ms', own.model .. ':cost')
  if not slots or not r[1] then return nil end
  local capacity = slots[1]
  local turn = math.floor(sum.pictures + 0.5) + math.min(own.n, slots[2]) - 1
  local rounds = math.floor(turn / capacity)
  local wait = 0
  if rounds > 0 then wait = rounds * sum.cost / sum.pictures * r[1] / r[2] end
  local at = redis.call('ZCARD', K.DUE .. own.model) - capacity + turn % capacity
  if at < 0 then return wait end
  return wait + math.max(0, redis.call('ZRANGE', K.DUE .. own.model, at, at, 'WITHSCORES')[2] - now)
end

-- Milliseconds until a task that waits is done; nil unknown.
local function eta_ms(own, sum, slots, now)
  local wait, run = wait_ms(own, sum, slots, now), run_ms(own, slots)
  return wait and run and wait + run
end
