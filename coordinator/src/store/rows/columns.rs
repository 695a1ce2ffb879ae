//! A row's values, read one by one as what they should be.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use mesh_core::node::{AttributeName, AttributeValue, Owner, Tag, UserId};

use super::Value;

/// Which column did not hold what it must. A row whose sum is right never gets here unless another
/// version wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Unreadable(pub(in crate::store) &'static str);

/// The values of one row, taken from the left.
#[derive(Debug)]
pub(in crate::store) struct Columns(std::vec::IntoIter<Value>);

impl Columns {
    pub(in crate::store) fn new(values: Vec<Value>) -> Self {
        Self(values.into_iter())
    }

    pub(super) fn int(&mut self, what: &'static str) -> Result<u64, Unreadable> {
        match self.0.next() {
            Some(Value::Int(n)) => u64::try_from(n).map_err(|_| Unreadable(what)),
            _ => Err(Unreadable(what)),
        }
    }

    pub(super) fn optional(&mut self, what: &'static str) -> Result<Option<u64>, Unreadable> {
        match self.0.next() {
            Some(Value::Null) => Ok(None),
            Some(Value::Int(n)) => u64::try_from(n).map(Some).map_err(|_| Unreadable(what)),
            _ => Err(Unreadable(what)),
        }
    }

    pub(super) fn flag(&mut self, what: &'static str) -> Result<bool, Unreadable> {
        match self.int(what)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Unreadable(what)),
        }
    }

    pub(super) fn text(&mut self, what: &'static str) -> Result<String, Unreadable> {
        match self.0.next() {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(Unreadable(what)),
        }
    }

    pub(super) fn said(&mut self, what: &'static str) -> Result<String, Unreadable> {
        match self.0.next() {
            Some(Value::Null) => Ok(String::new()),
            Some(Value::Text(text)) => Ok(text),
            _ => Err(Unreadable(what)),
        }
    }

    pub(super) fn parse<T: FromStr>(&mut self, what: &'static str) -> Result<T, Unreadable> {
        self.text(what)?.parse().map_err(|_| Unreadable(what))
    }

    pub(super) fn blob<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], Unreadable> {
        match self.0.next() {
            Some(Value::Blob(bytes)) => bytes.try_into().map_err(|_| Unreadable(what)),
            _ => Err(Unreadable(what)),
        }
    }

    pub(super) fn list<T: Ord>(
        &mut self,
        what: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<BTreeSet<T>, Unreadable> {
        let items: Vec<String> =
            serde_json::from_str(&self.text(what)?).map_err(|_| Unreadable(what))?;
        items
            .iter()
            .map(|item| parse(item))
            .collect::<Option<_>>()
            .ok_or(Unreadable(what))
    }

    pub(super) fn attributes(
        &mut self,
        what: &'static str,
    ) -> Result<BTreeMap<AttributeName, AttributeValue>, Unreadable> {
        let text = self.said(what)?;
        if text.is_empty() {
            return Ok(BTreeMap::new());
        }
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&text).map_err(|_| Unreadable(what))?;
        let read = |(name, value): (String, serde_json::Value)| {
            let value = match value {
                serde_json::Value::String(text) => AttributeValue::Text(text),
                serde_json::Value::Bool(flag) => AttributeValue::Bool(flag),
                number => AttributeValue::Number(number.as_i64()?),
            };
            Some((AttributeName::parse(&name).ok()?, value))
        };
        let read: Option<_> = object.into_iter().map(read).collect();
        read.ok_or(Unreadable(what))
    }

    pub(super) fn owner(&mut self) -> Result<Owner, Unreadable> {
        let user = self.optional("user")?;
        let tags = self.list("tags", |tag| Tag::parse(tag).ok())?;
        match user {
            Some(user) if tags.is_empty() => Ok(Owner::User(UserId(user))),
            Some(_) => Err(Unreadable("tags")),
            None => Ok(Owner::Tags(tags)),
        }
    }
}
