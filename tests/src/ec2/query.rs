//! The parameters of a call, as the EC2 Query protocol has them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use super::model::Tags;

/// Why a call is not done: status, code and message of EC2's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: String,
    pub(super) message: String,
}

/// A refusal with status 400, as most are.
pub(super) fn refuse(code: &str, message: impl Into<String>) -> Refusal {
    Refusal { status: 400, code: code.to_owned(), message: message.into() }
}

/// A refusal of a parameter's value.
pub(super) fn invalid(message: impl Into<String>) -> Refusal {
    refuse("InvalidParameterValue", message)
}

/// The decoded pairs of `application/x-www-form-urlencoded`.
pub(super) fn decode_form(form: &[u8]) -> BTreeMap<String, String> {
    let pairs = form.split(|b| *b == b'&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let mut parts = pair.splitn(2, |b| *b == b'=');
            let mut part = || decode(parts.next().unwrap_or_default());
            (part(), part())
        })
        .collect()
}

fn decode(text: &[u8]) -> String {
    let hex = |b: u8| char::from(b).to_digit(16).map(|digit| digit as u8);
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let escaped = match (first, after) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)),
            _ => None,
        };
        if let Some((high, low)) = escaped {
            bytes.push(high << 4 | low);
            rest = &after[2..];
        } else {
            bytes.push(if first == b'+' { b' ' } else { first });
            rest = after;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The parameters of one call. Those that an action does not ask for are refused: what the emulator does not know it must not
/// ignore.
#[derive(Debug)]
pub(super) struct Parameters<'a> {
    all: &'a BTreeMap<String, String>,
    seen: RefCell<BTreeSet<String>>,
}

impl<'a> Parameters<'a> {
    pub(super) fn new(all: &'a BTreeMap<String, String>) -> Parameters<'a> {
        let seen = ["Action", "Version", "DryRun"].map(str::to_owned).into();
        Parameters { all, seen: RefCell::new(seen) }
    }

    /// Everything that was sent.
    pub(super) fn all(&self) -> &'a BTreeMap<String, String> {
        self.all
    }

    pub(super) fn optional(&self, name: &str) -> Option<&'a str> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.all.get(name).map(String::as_str)
    }

    pub(super) fn required(&self, name: &str) -> Result<&'a str, Refusal> {
        let missing = || {
            let message = format!("The request must contain the parameter {}", lower_camel(name));
            refuse("MissingParameter", message)
        };
        self.optional(name).filter(|value| !value.is_empty()).ok_or_else(missing)
    }

    fn parsed<T: FromStr>(&self, name: &str, kind: &str) -> Result<Option<T>, Refusal> {
        let parse = |text: &str| {
            text.parse().map_err(|_| {
                invalid(format!("Value ({text}) for parameter {} is invalid. {kind}", lower_camel(name)))
            })
        };
        self.optional(name).map(parse).transpose()
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        self.parsed(name, "Must be a number.")
    }

    pub(super) fn boolean(&self, name: &str) -> Result<bool, Refusal> {
        Ok(self.parsed(name, "Must be true or false.")?.unwrap_or(false))
    }

    /// The values of `NAME.1`, `NAME.2`..., in the order of their numbers.
    pub(super) fn list(&self, name: &str) -> Vec<&'a str> {
        let numbers = self.members(name);
        numbers.iter().filter_map(|number| self.optional(&format!("{name}.{number}"))).collect()
    }

    /// The numbers that follow a name.
    fn members(&self, name: &str) -> BTreeSet<u32> {
        let prefix = format!("{name}.");
        let number = |key: &String| key.strip_prefix(&prefix)?.split('.').next()?.parse().ok();
        self.all.keys().filter_map(number).collect()
    }

    /// `Filter.N.Name` and `Filter.N.Value.M`.
    pub(super) fn filters(&self) -> Result<Vec<(&'a str, Vec<&'a str>)>, Refusal> {
        let filter = |number: u32| {
            let name = self.required(&format!("Filter.{number}.Name"))?;
            Ok((name, self.list(&format!("Filter.{number}.Value"))))
        };
        let filters: Vec<_> =
            self.members("Filter").into_iter().map(filter).collect::<Result<_, Refusal>>()?;
        if filters.iter().map(|(_, values)| values.len()).sum::<usize>() > 200 {
            let message = "The maximum number of filter values specified on a single call is 200";
            return Err(refuse("FilterLimitExceeded", message));
        }
        Ok(filters)
    }

    /// `PREFIX.N.Key` and `PREFIX.N.Value`.
    pub(super) fn tags(&self, prefix: &str) -> Result<Tags, Refusal> {
        let mut tags = Tags::new();
        for number in self.members(prefix) {
            let key = self.required(&format!("{prefix}.{number}.Key"))?;
            let value = self.optional(&format!("{prefix}.{number}.Value")).unwrap_or_default();
            if key.starts_with("aws:") {
                let message = "Tag keys starting with 'aws:' are reserved for internal use";
                return Err(invalid(message));
            }
            if key.chars().count() > 127 || value.chars().count() > 255 {
                return Err(invalid("Tag keys have at most 127 characters, values 255"));
            }
            if tags.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(invalid(format!("Duplicate tag key '{key}' specified.")));
            }
        }
        Ok(tags)
    }

    /// `TagSpecification.N`, all of which must be for `resource`.
    pub(super) fn tag_specifications(&self, resource: &str) -> Result<Tags, Refusal> {
        let mut tags = Tags::new();
        for number in self.members("TagSpecification") {
            let given = self.required(&format!("TagSpecification.{number}.ResourceType"))?;
            if given != resource {
                let message = format!("'{given}' is not a valid taggable resource type for this operation.");
                return Err(invalid(message));
            }
            tags.extend(self.tags(&format!("TagSpecification.{number}.Tag"))?);
        }
        Ok(tags)
    }

    /// To be called when all parameters are read, before anything is done: refuses those that nobody asked for, and dry runs.
    pub(super) fn finish(&self) -> Result<(), Refusal> {
        let seen = self.seen.borrow();
        if let Some(name) = self.all.keys().find(|name| !seen.contains(*name)) {
            return Err(refuse("UnknownParameter", format!("The parameter {name} is not recognized")));
        }
        if self.boolean_seen("DryRun")? {
            let message = "Request would have succeeded, but DryRun flag is set.";
            return Err(Refusal { status: 412, ..refuse("DryRunOperation", message) });
        }
        Ok(())
    }

    fn boolean_seen(&self, name: &str) -> Result<bool, Refusal> {
        match self.all.get(name).map(String::as_str) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => Err(invalid(format!("Value ({other}) for parameter {name} is invalid."))),
        }
    }
}

/// EC2's messages name parameters so.
fn lower_camel(name: &str) -> String {
    let mut characters = name.chars();
    characters.next().map_or_else(String::new, |first| first.to_lowercase().chain(characters).collect())
}

/// Checks the form of an identifier.
pub(super) fn checked_id(id: &str, prefix: &str) -> Result<(), Refusal> {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    let digits = id.strip_prefix(prefix).unwrap_or_default();
    if matches!(digits.len(), 8 | 17) && digits.bytes().all(hex) {
        return Ok(());
    }
    Err(match prefix {
        "i-" => refuse("InvalidInstanceID.Malformed", format!("Invalid id: \"{id}\"")),
        "snap-" => refuse("InvalidSnapshotID.Malformed", format!("Invalid id: \"{id}\"")),
        _ => invalid(format!("Value ({id}) for parameter volumeId is invalid. Expected: '{prefix}...'.")),
    })
}

/// Whether a text is matched by a filter's value, in which `*` and `?` stand for others.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    fn here(pattern: &[char], text: &[char]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some(('*', rest)) => (0..=text.len()).any(|skipped| here(rest, &text[skipped..])),
            Some(('?', rest)) => !text.is_empty() && here(rest, &text[1..]),
            Some((first, rest)) => text.first() == Some(first) && here(rest, &text[1..]),
        }
    }
    here(&pattern.chars().collect::<Vec<_>>(), &text.chars().collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded() {
        let form = decode_form(b"Action=X&Tag.1.Key=a%2Fb+c&Tag.1.Value=%C3%A4&Empty=&Odd=100%&Flag");
        let pairs = [
            ("Action", "X"),
            ("Empty", ""),
            ("Flag", ""),
            ("Odd", "100%"),
            ("Tag.1.Key", "a/b c"),
            ("Tag.1.Value", "ä"),
        ];
        assert_eq!(form, pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }

    #[test]
    fn lists_are_in_the_order_of_their_numbers() {
        let form = decode_form(b"V.10=c&V.2=b&V.1=a&Filter.1.Name=n&Filter.1.Value.1=x&Filter.1.Value.2=y");
        let parameters = Parameters::new(&form);
        assert_eq!(parameters.list("V"), ["a", "b", "c"]);
        assert_eq!(parameters.filters().unwrap(), [("n", vec!["x", "y"])]);
        parameters.finish().unwrap();
    }

    #[test]
    fn what_nobody_asked_for_is_refused() {
        let form = decode_form(b"Action=X&Size=4&Other=1");
        let parameters = Parameters::new(&form);
        assert_eq!(parameters.number("Size").unwrap(), Some(4));
        assert_eq!(parameters.finish().unwrap_err().code, "UnknownParameter");
    }

    #[test]
    fn dry_runs_end_before_anything_is_done() {
        let form = decode_form(b"DryRun=true");
        assert_eq!(Parameters::new(&form).finish().unwrap_err().status, 412);
    }

    #[test]
    fn filters_take_wildcards() {
        assert!(matches("a*c?", "abbbcd") && matches("*", "") && !matches("a?", "a") && !matches("b", "bb"));
    }

    #[test]
    fn malformed_ids_are_told_by_their_kind() {
        checked_id("vol-0123456789abcdef0", "vol-").unwrap();
        checked_id("vol-01234567", "vol-").unwrap();
        assert_eq!(checked_id("vol-xyz", "vol-").unwrap_err().code, "InvalidParameterValue");
        assert_eq!(checked_id("vol-01234567", "i-").unwrap_err().code, "InvalidInstanceID.Malformed");
    }
}
