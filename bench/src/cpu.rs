//! CPU time of processes, from /proc.

/// User and system time of the processes so far, in seconds.
///
/// # Errors
/// The process that has no readable `/proc/PID/stat`.
pub fn seconds(pids: &[u32]) -> Result<f64, String> {
    let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        ticks += ticks_of(&text).ok_or_else(|| format!("{path}: cannot be read as proc(5) says"))?;
    }
    Ok(ticks as f64 / ticks_per_second)
}

/// utime + stime, fields 14 and 15 of proc(5). The second field is a name in parentheses, which
/// may hold spaces and parentheses itself.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_are_found_behind_a_hostile_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 7 9 20 0 1 0 100 1 1";
        assert_eq!(ticks_of(stat), Some(300));
        assert_eq!(ticks_of("42 (a S 1"), None);
    }

    #[test]
    fn this_process_can_be_measured_and_a_dead_one_is_named() {
        assert!(seconds(&[std::process::id()]).unwrap() >= 0.0);
        assert!(seconds(&[u32::MAX]).unwrap_err().contains("4294967295"));
    }
}
