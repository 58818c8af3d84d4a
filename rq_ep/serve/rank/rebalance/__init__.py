"""Re-placing experts while serving: loads of steps, a planner process, and the state of a migration."""
