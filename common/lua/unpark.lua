-- Lets the tasks of a key stand in line again whose limit may have been raised.
-- ARGV: key id
unpark(ARGV[1])
return 'ok'
