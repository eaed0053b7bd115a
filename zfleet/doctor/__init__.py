"""`zfleet doctor`: whether this machine has all that its part of a fleet needs. A module for each topic."""
