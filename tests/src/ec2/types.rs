//! What volumes of a type may be like.

use super::query::{Refusal, invalid, refuse};

/// Bounds of a type: sizes in GiB, IOPS, and IOPS for each GiB. No IOPS: they cannot be given.
struct Bounds {
    gib: (u64, u64),
    iops: Option<(u64, u64, u64)>,
}

fn bounds(volume_type: &str) -> Result<Bounds, Refusal> {
    let (gib, iops) = match volume_type {
        "io2" => ((4, 65_536), Some((100, 256_000, 1000))),
        "io1" => ((4, 16_384), Some((100, 64_000, 50))),
        "gp3" => ((1, 65_536), Some((3000, 80_000, 500))),
        "gp2" => ((1, 16_384), None),
        "st1" | "sc1" => ((125, 16_384), None),
        "standard" => ((1, 1024), None),
        _ => {
            let message = format!(
                "Value ({volume_type}) for parameter volumeType is invalid. Expected: 'gp3', 'gp2', 'io2', ..."
            );
            return Err(refuse("InvalidParameterValue", message));
        }
    };
    Ok(Bounds { gib, iops })
}

/// Checks a size.
pub(super) fn checked_size(volume_type: &str, gib: u64) -> Result<(), Refusal> {
    let (least, most) = bounds(volume_type)?.gib;
    match gib {
        _ if gib < least => Err(invalid(format!("Volume of {gib}GiB is too small; minimum is {least}GiB."))),
        _ if gib > most => Err(invalid(format!("Volume of {gib}GiB is too large; maximum is {most}GiB."))),
        _ => Ok(()),
    }
}

/// Checks IOPS; what a volume has when it is given these.
pub(super) fn checked_iops(volume_type: &str, gib: u64, iops: Option<u64>) -> Result<Option<u64>, Refusal> {
    let Some((least, most, ratio)) = bounds(volume_type)?.iops else {
        if iops.is_some() {
            let message = format!("The parameter iops is not supported for {volume_type} volumes.");
            return Err(refuse("InvalidParameterCombination", message));
        }
        return Ok((volume_type == "gp2").then_some((3 * gib).clamp(100, 16_000)));
    };
    // What gp3 has without being asked is not bound to the size.
    let iops = match iops {
        Some(iops) => iops,
        None if volume_type == "gp3" => return Ok(Some(least)),
        None => return Err(refuse("MissingParameter", "The request must contain the parameter iops")),
    };
    match iops {
        _ if iops < least => Err(invalid(format!("Volume iops of {iops} is too low; minimum is {least}."))),
        _ if iops > most => Err(invalid(format!("Volume iops of {iops} is too high; maximum is {most}."))),
        _ if iops > least.max(ratio * gib) || (iops > ratio * gib && volume_type != "gp3") => {
            Err(invalid(format!(
                "Iops to volume size ratio of {:.6} is too high; maximum is {ratio}.000000",
                iops as f64 / gib as f64
            )))
        }
        _ => Ok(Some(iops)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iops_are_bound_to_the_size() {
        assert_eq!(checked_iops("io2", 4, Some(4000)).unwrap(), Some(4000));
        let high = checked_iops("io2", 4, Some(4001)).unwrap_err();
        assert!(
            high.code == "InvalidParameterValue" && high.message.contains("ratio of 1000.25"),
            "{high:?}"
        );
        assert!(checked_iops("io2", 65_536, Some(256_001)).is_err());
        assert!(checked_iops("io2", 65_536, Some(256_000)).is_ok());
        assert!(checked_iops("io2", 4, Some(99)).is_err());
        assert_eq!(checked_iops("io2", 4, None).unwrap_err().code, "MissingParameter");
        assert!(checked_iops("io1", 4, Some(201)).is_err());
        assert_eq!(checked_iops("gp2", 4, Some(100)).unwrap_err().code, "InvalidParameterCombination");
        assert_eq!(checked_iops("gp3", 1, None).unwrap(), Some(3000));
    }

    #[test]
    fn sizes_have_bounds() {
        assert!(checked_size("io2", 3).is_err() && checked_size("io2", 65_537).is_err());
        assert!(checked_size("io2", 4).is_ok() && checked_size("io2", 65_536).is_ok());
        assert!(checked_size("io3", 4).is_err());
    }
}
