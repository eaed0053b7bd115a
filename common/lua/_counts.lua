-- The fleet's counters, by which Prometheus and the charts know what was done: numbers in one hash that only grow. A field is
-- `what|label|…`; of a histogram `what|label|…|bound` has how many were within that bound and not within a smaller one, and
-- `…|sum` their sum (of durations, µs). Labels are models, outcomes, stages and bounds: few, and never a tenant's or a task's.

-- Adds to counters: `more` is {field, by how much …}, each field once. Two commands, however many there are.
local function count(more)
  local fields = {}
  for i = 1, #more, 2 do fields[#fields + 1] = more[i] end
  for i, before in ipairs(redis.call('HMGET', K.COUNTS, unpack(fields))) do
    more[2 * i] = more[2 * i] + (before or 0)
  end
  redis.call('HSET', K.COUNTS, unpack(more))
end

-- Adds to `more` what counts a duration in a histogram with these bounds, in seconds.
local function observe(more, histogram, ms, bounds)
  for bound in string.gmatch(bounds, '%S+') do
    if bound == '+Inf' or ms <= bound * 1000 then
      local at = #more
      more[at + 1], more[at + 2] = histogram .. '|' .. bound, 1
      more[at + 3], more[at + 4] = histogram .. '|sum', math.floor(ms * 1000 + 0.5)
      return
    end
  end
end
