/*! Numbers with their units, as every report and progress line writes them. */

/// Decimal units, as disk makers and safetensors indices count: `512 B`, `45.1 MB`, `13.5 GB`.
pub fn bytes(bytes: u64) -> String {
    let value = bytes as f64;
    let scaled = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
        .into_iter()
        // 999.96 MB would be printed as 1000.0 MB: it belongs to the unit above.
        .find(|(unit, _)| value >= unit * 0.99995);
    match scaled {
        Some((unit, name)) => format!("{:.1} {name}", value / unit),
        None => format!("{bytes} B"),
    }
}

/// `0.03 s`, `1.2 s`, and from 100 s on `1 m 40 s` or `2 h 03 m`.
pub fn seconds(seconds: f64) -> String {
    if seconds < 0.995 {
        return format!("{seconds:.2} s");
    }
    if seconds < 99.95 {
        return format!("{seconds:.1} s");
    }
    let rounded = seconds.round() as u64;
    let (hours, minutes) = (rounded / 3600, rounded % 3600 / 60);
    if hours == 0 {
        format!("{minutes} m {:02} s", rounded % 60)
    } else {
        format!("{hours} h {minutes:02} m")
    }
}

/// A ratio's distance from 1 in percent, signed: 1.214 is `+21.4 %`.
pub fn change(ratio: f64) -> String {
    format!("{:+.1} %", (ratio - 1.0) * 100.0)
}

/// Integers in groups of three digits: `303104` is `303 104`.
pub fn count(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// `1 block`, `2 blocks`.
pub fn counted(number: usize, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_decimal() {
        for (number, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (45_123_456, "45.1 MB"),
            (999_960_000, "1.0 GB"),
            (13_476_000_000, "13.5 GB"),
            (2_000_000_000_000, "2.0 TB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn seconds_grow_into_minutes_and_hours() {
        for (number, text) in [
            (0.034, "0.03 s"),
            (0.996, "1.0 s"),
            (1.23, "1.2 s"),
            (99.94, "99.9 s"),
            (99.96, "1 m 40 s"),
            (3599.4, "59 m 59 s"),
            (7384.0, "2 h 03 m"),
        ] {
            assert_eq!(seconds(number), text);
        }
    }

    #[test]
    fn changes_are_signed_and_counts_grouped() {
        assert_eq!(change(1.214), "+21.4 %");
        assert_eq!(change(0.99), "-1.0 %");
        assert_eq!(
            (count(7), count(1000), count(303_104)),
            ("7".into(), "1 000".into(), "303 104".into())
        );
        assert_eq!(
            (counted(1, "block"), counted(1200, "block")),
            ("1 block".into(), "1 200 blocks".into())
        );
    }
}
