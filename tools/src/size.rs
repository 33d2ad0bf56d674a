//! Sizes as people write and read them: `4GiB`, `10M`, `1.5 TiB`.
//!
//! Units are powers of 1024 unless they say otherwise: `K`, `KiB` are 1024, `KB` is 1000.

/// Reads a size in bytes: a number, perhaps with a fraction, and perhaps a unit (B, K, KiB, KB, M, ... T, TiB,
/// TB; case does not matter).
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = (&text[..split], text[split..].trim());
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => {
            return Err(format!("{unit:?} is no unit: use B, KiB, MiB, GiB, TiB (or K, M, G, T), e.g. 4GiB"));
        }
    };
    let wrong = || format!("{text:?} is no size: write a number and a unit, e.g. 4GiB, 512M or 1.5TiB");
    let too_large = || format!("{text:?} is too large");
    match number.split_once('.') {
        None => {
            let number: u64 =
                number.parse().map_err(|_| if number.is_empty() { wrong() } else { too_large() })?;
            number.checked_mul(factor).ok_or_else(too_large)
        }
        Some(_) => {
            let number: f64 = number.parse().map_err(|_| wrong())?;
            let bytes = number * factor as f64;
            // Above 2^63 a float could round up to what u64 cannot hold.
            if bytes >= (1u64 << 63) as f64 { Err(too_large()) } else { Ok(bytes.round() as u64) }
        }
    }
}

/// A size for people: three digits or so, in powers of 1024.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 999.5 so that rounding never shows "1000".
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value < 9.95 { format!("{value:.1} {}", UNITS[unit]) } else { format!("{value:.0} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("17B", 17),
            ("4K", 4096),
            ("4KiB", 4096),
            ("4 kib", 4096),
            ("4kB", 4000),
            ("4GiB", 4 << 30),
            ("1.5TiB", 3 << 39),
            (" 2m ", 2 << 20),
            ("0.5K", 512),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text:?}");
        }
        for bad in [
            "",
            "GiB",
            "4XB",
            "-1",
            "1e3",
            "4 G B",
            "..",
            "1.2.3",
            "99999999999999999999",
            "20000000T",
            "9999999.0T",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}: {:?}", parse(bad));
        }
        assert_eq!(
            parse("4XB").unwrap_err(),
            "\"XB\" is no unit: use B, KiB, MiB, GiB, TiB (or K, M, G, T), e.g. 4GiB"
        );
    }

    #[test]
    fn sizes_print() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (10 << 10, "10 KiB"),
            (1023 << 10, "1.0 MiB"),
            (4 << 30, "4.0 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
