//! From the arena to a tree: a walk of limited depth and limited size.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Item, LONGEST_KEY, Node, Pickle};
use crate::error::Result;
use crate::formats::{StoredTensor, Value};
use crate::{bail, ensure};

const DEEPEST: usize = 100;

impl Pickle {
    /// The root as a tree. `tensors` are those of `self.tensors`, in the same order.
    pub fn tree(&self, tensors: &[Arc<StoredTensor>]) -> Result<Value> {
        // Shared parts are repeated in the tree, which a real checkpoint does with little more than a few tuples.
        let mut walk = Walk { pickle: self, tensors, left: (2 * self.size).max(1 << 14) };
        walk.value(self.root, 0)
    }
}

struct Walk<'a> {
    pickle: &'a Pickle,
    tensors: &'a [Arc<StoredTensor>],
    left: usize,
}

impl Walk<'_> {
    fn value(&mut self, item: Item, depth: usize) -> Result<Value> {
        ensure!(depth < DEEPEST, "its objects are nested more than {DEEPEST} deep, or contain themselves");
        ensure!(self.left > 0, "its shared objects multiply beyond reason");
        self.left -= 1;
        let number = match item {
            Item::None => return Ok(Value::None),
            Item::Bool(b) => return Ok(Value::Bool(b)),
            Item::Int(i) => return Ok(Value::Int(i)),
            Item::Float(x) => return Ok(Value::Float(x)),
            Item::Global(global) => return Ok(Value::Global(global.name())),
            Item::Node(number) => number,
        };
        Ok(match &self.pickle.nodes[number as usize] {
            Node::BigInt(bytes) => Value::BigInt(bytes.clone()),
            Node::Str(text) => Value::Str(text.clone()),
            Node::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Node::List(items) => Value::List(self.values(items, depth)?),
            Node::Tuple(items) => Value::Tuple(self.values(items, depth)?),
            Node::Dict { pairs, .. } => Value::Dict(self.pairs(pairs, depth)?),
            Node::Namespace { state } => Value::Namespace(self.attributes(*state, depth)?),
            Node::Tensor(tensor) => Value::Tensor(self.tensors[*tensor].clone()),
            Node::Storage(_) => bail!("a storage stands where a tensor or plain data is expected"),
        })
    }

    fn values(&mut self, items: &[Item], depth: usize) -> Result<Vec<Value>> {
        items.iter().map(|&item| self.value(item, depth + 1)).collect()
    }

    fn pairs(&mut self, pairs: &[(Item, Item)], depth: usize) -> Result<Vec<(Value, Value)>> {
        // Neither is sized beforehand: a dict that contains itself would have its size reserved at each level of the walk.
        let mut seen = HashSet::new();
        let mut out = Vec::new();
        for &(key, value) in pairs {
            let key = self.value(key, depth + 1)?;
            ensure!(seen.insert(hashable(&key)?), "a dict has the same key twice");
            out.push((key, self.value(value, depth + 1)?));
        }
        Ok(out)
    }

    fn attributes(&mut self, state: Option<Item>, depth: usize) -> Result<Vec<(Arc<str>, Value)>> {
        let Some(state) = state else { return Ok(Vec::new()) };
        let Value::Dict(pairs) = self.value(state, depth + 1)? else { bail!("a Namespace's state is not a dict") };
        let named = pairs.into_iter().map(|(key, value)| match key {
            Value::Str(name) => Ok((name, value)),
            other => bail!("a Namespace has {} as an attribute's name", other.kind()),
        });
        named.collect()
    }
}

/// A dict's key in a form that Rust can hash.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    None,
    Int(i64),
    Float(u64),
    Str(Arc<str>),
    Tuple(Vec<Key>),
    Global(&'static str),
}

fn hashable(value: &Value) -> Result<Key> {
    Ok(match value {
        Value::None => Key::None,
        Value::Bool(b) => Key::Int((*b).into()),
        Value::Int(i) => Key::Int(*i),
        Value::Float(x) => Key::Float(x.to_bits()),
        Value::Str(text) if text.len() <= LONGEST_KEY => Key::Str(text.clone()),
        Value::Str(text) => bail!("the key of a dict has {} bytes (at most {LONGEST_KEY})", text.len()),
        Value::Tuple(items) => Key::Tuple(items.iter().map(hashable).collect::<Result<_>>()?),
        Value::Global(name) => Key::Global(name),
        other => bail!("{} cannot be the key of a dict", other.kind()),
    })
}
