-- Replaces the secret of a purpose. The one before is good for a while beside it.
-- ARGV: purpose, new secret (hex), overlap_ms
-- Returns 'ok'
local before = redis.call('HGET', K.SECRETS, ARGV[1])
if before ~= ARGV[2] then
  if before then
    redis.call('HSET', K.SECRETS, ARGV[1] .. K.SECRET_BEFORE, before .. ' ' .. string.format('%d', now_ms() + ARGV[3]))
  end
  redis.call('HSET', K.SECRETS, ARGV[1], ARGV[2])
end
return 'ok'
