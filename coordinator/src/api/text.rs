//! What callers say, as it may stand in answers, in the log and in the store.

/// The name that stands before line and column in an error.
pub(super) fn file_name(file: &str) -> String {
    let printable = printable(file);
    // What comes from standard input has no name.
    match printable.as_str() {
        "" | "-" => "policy".to_owned(),
        _ => printable,
    }
}

pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(256).collect()
}
