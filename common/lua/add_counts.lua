-- Adds to the fleet's counters what a process has counted by itself.
-- ARGV: process, number (new for each telling, the same when re-sent), field, by how much …
-- Returns 'ok' | 'already'
if redis.call('GET', K.COUNTED .. ARGV[1]) == ARGV[2] then return 'already' end
redis.call('SET', K.COUNTED .. ARGV[1], ARGV[2], 'EX', K.COUNTED_TTL_S)
count({unpack(ARGV, 3)})
return 'ok'
