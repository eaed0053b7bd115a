-- Notes how much room there is on the disk that a host keeps results on.
-- ARGV: host, bytes free, bytes in all
-- Returns 'ok'
redis.call('HSET', K.DISKS, ARGV[1], ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. string.format('%d', now_ms()))
return 'ok'
