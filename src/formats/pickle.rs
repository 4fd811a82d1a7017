//! A reader of pickles that executes nothing.
//!
//! A pickle is a program for a stack machine. This machine knows the opcodes of protocols 2 to 5 that checkpoints use, and five
//! callables, all inert: `collections.OrderedDict`, `argparse.Namespace`, `torch._utils._rebuild_tensor_v2`,
//! `torch._utils._rebuild_parameter` and the storage classes. Any other global is refused where it is looked up.
//!
//! Objects live in one arena and name each other by number, so shared and circular references cost nothing and no drop recurses. The
//! arena becomes a tree of values by a walk of limited depth and limited size. Each opcode does work in proportion to the bytes and
//! stack items that it consumes, so time and memory are bounded by the file's size.

mod global;
mod tree;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

pub(super) use global::storage_class;

use self::global::Global;
use super::tensor::numel;
use super::{FileDtype, quoted};
use crate::error::{Context, Error, Result};
use crate::{bail, ensure};

/// The opcode that starts every pickle of protocol 2 and later.
pub(super) const FIRST_BYTE: u8 = 0x80;
const MOST_DIMENSIONS: usize = 16;
/// Keys are hashed again at each mention, so they may not be long.
const LONGEST_KEY: usize = 1024;

/// One pickle, read: objects, and the storages and tensors they mention.
pub(super) struct Pickle {
    nodes: Vec<Node>,
    root: Item,
    pub storages: Vec<StorageSpec>,
    pub tensors: Vec<TensorSpec>,
    /// Where the pickle ends in the bytes it was read from.
    pub end: usize,
    size: usize,
}

/// A storage as the pickle declares it.
pub(super) struct StorageSpec {
    pub dtype: FileDtype,
    pub key: Arc<str>,
    pub count: usize,
}

impl StorageSpec {
    /// The declared size, or None where it overflows.
    pub fn byte_len(&self) -> Option<usize> {
        self.count.checked_mul(self.dtype.size())
    }
}

/// A view of a storage, in elements; checked to lie inside the declared count.
pub(super) struct TensorSpec {
    pub storage: usize,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// A small value itself, or the number of a node.
#[derive(Clone, Copy)]
enum Item {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Global(Global),
    Node(u32),
}

enum Node {
    BigInt(Arc<[u8]>),
    Str(Arc<str>),
    Bytes(Arc<[u8]>),
    List(Vec<Item>),
    Tuple(Vec<Item>),
    Dict { pairs: Vec<(Item, Item)>, ordered: bool },
    Namespace { state: Option<Item> },
    Storage(usize),
    Tensor(usize),
}

/// Reads the pickle that starts at `start`; it may end before the bytes do.
pub(super) fn read(bytes: &[u8], start: usize) -> Result<Pickle> {
    let mut machine = Machine { bytes, at: start, ..Machine::default() };
    loop {
        let opcode_at = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                let Machine { nodes, storages, tensors, at: end, .. } = machine;
                return Ok(Pickle { nodes, root, storages, tensors, end, size: end - start });
            }
            Err(error) => return Err(error).with_context(|| format!("the pickle is wrong at byte {opcode_at}")),
        }
    }
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Item>,
    marks: Vec<usize>,
    memo: Vec<Option<Item>>,
    memo_used: usize,
    nodes: Vec<Node>,
    storages: Vec<StorageSpec>,
    storage_by_key: HashMap<Arc<str>, usize>,
    tensors: Vec<TensorSpec>,
}

impl Machine<'_> {
    /// Runs one opcode; the root comes with STOP.
    fn step(&mut self) -> Result<Option<Item>> {
        match self.take::<1>()?[0] {
            0x80 => self.protocol()?,
            b'(' => self.marks.push(self.stack.len()),
            b'.' => return self.stop().map(Some),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'N' => self.stack.push(Item::None),
            0x88 => self.stack.push(Item::Bool(true)),
            0x89 => self.stack.push(Item::Bool(false)),
            b'K' => self.int::<1>(|b| b[0].into())?,
            b'M' => self.int::<2>(|b| u16::from_le_bytes(b).into())?,
            b'J' => self.int::<4>(|b| i32::from_le_bytes(b).into())?,
            0x8a => {
                let len = self.length::<1>()?;
                self.long(len)?;
            }
            0x8b => {
                let len = i32::from_le_bytes(self.take()?);
                let len = usize::try_from(len).map_err(|_| Error::new("an integer has a negative length"))?;
                self.long(len)?;
            }
            b'G' => {
                let x = f64::from_be_bytes(self.take()?);
                self.stack.push(Item::Float(x));
            }
            0x8c => self.string::<1>()?,
            b'X' => self.string::<4>()?,
            0x8d => self.string::<8>()?,
            b'C' => self.byte_string::<1>()?,
            b'B' => self.byte_string::<4>()?,
            0x8e => self.byte_string::<8>()?,
            b'}' => self.push_node(Node::Dict { pairs: Vec::new(), ordered: false })?,
            b']' => self.push_node(Node::List(Vec::new()))?,
            b')' => self.push_node(Node::Tuple(Vec::new()))?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_node(Node::Tuple(items))?;
            }
            0x85 => self.short_tuple(1)?,
            0x86 => self.short_tuple(2)?,
            0x87 => self.short_tuple(3)?,
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)?;
            }
            b'q' => {
                let slot = self.length::<1>()?;
                self.memoize(slot)?;
            }
            b'r' => {
                let slot = self.length::<4>()?;
                self.memoize(slot)?;
            }
            0x94 => self.memoize(self.memo_used)?,
            b'h' => {
                let slot = self.length::<1>()?;
                self.recall(slot)?;
            }
            b'j' => {
                let slot = self.length::<4>()?;
                self.recall(slot)?;
            }
            0x95 => {
                let len = self.length::<8>()?;
                ensure!(len <= self.bytes.len() - self.at, "a frame of {len} bytes leaves the file");
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Item::Global(Global::find(&module, &name)?));
            }
            0x93 => {
                let (name, module) = (self.pop_str()?, self.pop_str()?);
                self.stack.push(Item::Global(Global::find(&module, &name)?));
            }
            b'R' => self.reduce()?,
            0x81 => self.new_object()?,
            b'b' => self.build()?,
            b'Q' => self.persistent()?,
            other => bail!("the opcode {other:#04x} has no place in a checkpoint"),
        }
        Ok(None)
    }

    fn take_slice(&mut self, len: usize) -> Result<Range<usize>> {
        ensure!(len <= self.bytes.len() - self.at, "{len} bytes are wanted but only {} are left", self.bytes.len() - self.at);
        self.at += len;
        Ok(self.at - len..self.at)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let range = self.take_slice(N)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[range]);
        Ok(out)
    }

    /// An unsigned little-endian number of N bytes.
    fn length<const N: usize>(&mut self) -> Result<usize> {
        let number = self.take::<N>()?.iter().rev().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
        usize::try_from(number).map_err(|_| Error::new(format!("the length {number} is absurd")))
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| Error::new("a global's name has no end"))?;
        self.at += len + 1;
        String::from_utf8(rest[..len].to_vec()).context("a global's name is not UTF-8")
    }

    fn protocol(&mut self) -> Result<()> {
        let protocol = self.take::<1>()?[0];
        ensure!((2..=5).contains(&protocol), "pickle protocol {protocol} is not supported (2 to 5 are)");
        Ok(())
    }

    fn int<const N: usize>(&mut self, decode: impl Fn([u8; N]) -> i64) -> Result<()> {
        let bytes = self.take()?;
        self.stack.push(Item::Int(decode(bytes)));
        Ok(())
    }

    fn long(&mut self, len: usize) -> Result<()> {
        let range = self.take_slice(len)?;
        let mut bytes = &self.bytes[range];
        // A last byte that only repeats the sign adds nothing.
        while let [.., before, last] = bytes {
            let sign = if before & 0x80 == 0 { 0 } else { 0xff };
            if *last != sign {
                break;
            }
            bytes = &bytes[..bytes.len() - 1];
        }
        if bytes.len() > 8 {
            return self.push_node(Node::BigInt(bytes.into()));
        }
        let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut padded = [fill; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        self.stack.push(Item::Int(i64::from_le_bytes(padded)));
        Ok(())
    }

    fn string<const N: usize>(&mut self) -> Result<()> {
        let len = self.length::<N>()?;
        let range = self.take_slice(len)?;
        let text = std::str::from_utf8(&self.bytes[range]).context("a string is not UTF-8")?;
        self.push_node(Node::Str(text.into()))
    }

    fn byte_string<const N: usize>(&mut self) -> Result<()> {
        let len = self.length::<N>()?;
        let range = self.take_slice(len)?;
        self.push_node(Node::Bytes(self.bytes[range].into()))
    }

    fn push_node(&mut self, node: Node) -> Result<()> {
        let number = u32::try_from(self.nodes.len()).context("it holds too many objects")?;
        self.nodes.push(node);
        self.stack.push(Item::Node(number));
        Ok(())
    }

    fn node(&self, item: Item) -> Option<&Node> {
        match item {
            Item::Node(number) => Some(&self.nodes[number as usize]),
            _ => None,
        }
    }

    /// How many items lie above the last mark.
    fn above_mark(&self) -> usize {
        self.stack.len() - self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Item> {
        ensure!(self.above_mark() > 0, "the stack is empty");
        self.stack.pop().ok_or_else(|| Error::new("the stack is empty"))
    }

    fn top(&self) -> Result<Item> {
        ensure!(self.above_mark() > 0, "the stack is empty");
        self.stack.last().copied().ok_or_else(|| Error::new("the stack is empty"))
    }

    fn top_node(&mut self) -> Result<Option<&mut Node>> {
        Ok(match self.top()? {
            Item::Node(number) => Some(&mut self.nodes[number as usize]),
            _ => None,
        })
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Item>> {
        let mark = self.marks.pop().ok_or_else(|| Error::new("a mark is missing"))?;
        Ok(self.stack.drain(mark..).collect())
    }

    fn pop_str(&mut self) -> Result<Arc<str>> {
        let item = self.pop()?;
        self.str(item)
    }

    fn str(&self, item: Item) -> Result<Arc<str>> {
        match self.node(item) {
            Some(Node::Str(text)) => Ok(text.clone()),
            _ => bail!("a string is missing"),
        }
    }

    fn pop_tuple(&mut self) -> Result<&[Item]> {
        let item = self.pop()?;
        self.tuple(item)
    }

    fn tuple(&self, item: Item) -> Result<&[Item]> {
        match self.node(item) {
            Some(Node::Tuple(items)) => Ok(items),
            _ => bail!("a tuple is missing"),
        }
    }

    fn short_tuple(&mut self, len: usize) -> Result<()> {
        ensure!(self.above_mark() >= len, "the stack is empty");
        let items = self.stack.split_off(self.stack.len() - len);
        self.push_node(Node::Tuple(items))
    }

    fn append(&mut self, items: Vec<Item>) -> Result<()> {
        let Some(Node::List(list)) = self.top_node()? else { bail!("something other than a list is appended to") };
        list.extend(items);
        Ok(())
    }

    fn set_items(&mut self, items: Vec<Item>) -> Result<()> {
        let (entries, rest) = items.as_chunks::<2>();
        ensure!(rest.is_empty(), "a dict's key has no value");
        let Some(Node::Dict { pairs, .. }) = self.top_node()? else { bail!("entries are set in something other than a dict") };
        pairs.extend(entries.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn memoize(&mut self, slot: usize) -> Result<()> {
        let item = self.top()?;
        // Slots are numbered in sequence, so a number beyond the bytes read so far is only there to make the memo large.
        ensure!(slot <= self.at, "memo slot {slot} is absurd");
        if slot >= self.memo.len() {
            self.memo.resize(slot + 1, None);
        }
        self.memo_used += usize::from(self.memo[slot].is_none());
        self.memo[slot] = Some(item);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<()> {
        let item = self.memo.get(slot).copied().flatten();
        self.stack.push(item.ok_or_else(|| Error::new(format!("memo slot {slot} is empty")))?);
        Ok(())
    }

    fn stop(&mut self) -> Result<Item> {
        let root = self.pop()?;
        ensure!(self.stack.is_empty() && self.marks.is_empty(), "it stops with unfinished objects");
        Ok(root)
    }

    fn reduce(&mut self) -> Result<()> {
        let args = self.pop()?;
        let Item::Global(callable) = self.pop()? else { bail!("something that is no callable is called") };
        let args = self.tuple(args)?;
        match callable {
            Global::OrderedDict => {
                ensure!(args.is_empty(), "OrderedDict is called with arguments");
                self.push_node(Node::Dict { pairs: Vec::new(), ordered: true })
            }
            Global::RebuildTensor => {
                let spec = self.tensor_spec(args).context("a tensor is described wrongly")?;
                self.tensors.push(spec);
                self.push_node(Node::Tensor(self.tensors.len() - 1))
            }
            Global::RebuildParameter => {
                let &[tensor, Item::Bool(_), hooks] = args else { bail!("a parameter is described wrongly") };
                let wrapped = matches!(self.node(tensor), Some(Node::Tensor(_)));
                ensure!(wrapped && self.are_hooks(hooks), "a parameter is described wrongly");
                self.stack.push(tensor);
                Ok(())
            }
            Global::Namespace | Global::Storage(_) => bail!("{} is called as a function", callable.name()),
        }
    }

    /// Backward hooks are an OrderedDict without entries, or None.
    fn are_hooks(&self, item: Item) -> bool {
        matches!(item, Item::None) || matches!(self.node(item), Some(Node::Dict { pairs, .. }) if pairs.is_empty())
    }

    fn tensor_spec(&self, args: &[Item]) -> Result<TensorSpec> {
        // A seventh item, present in some files, marks conjugated and negated views; those are refused.
        let &[storage, offset, shape, strides, Item::Bool(_), hooks, ref marks @ ..] = args else {
            bail!("it is not (storage, offset, size, stride, requires_grad, hooks)");
        };
        let Some(&Node::Storage(storage)) = self.node(storage) else { bail!("it has no storage") };
        ensure!(self.are_hooks(hooks) && marks.len() <= 1 && marks.iter().all(|&m| self.are_hooks(m)), "it carries hooks or marks");
        let offset = size(offset)?;
        let sizes = |item| -> Result<Vec<usize>> {
            let items = self.tuple(item)?;
            ensure!(items.len() <= MOST_DIMENSIONS, "it has {} dimensions (at most {MOST_DIMENSIONS})", items.len());
            items.iter().copied().map(size).collect()
        };
        let (shape, strides) = (sizes(shape)?, sizes(strides)?);
        ensure!(shape.len() == strides.len(), "it has {} sizes but {} strides", shape.len(), strides.len());
        let count = numel(&shape).ok_or_else(|| Error::new(format!("its shape {shape:?} overflows")))?;
        if count > 0 {
            let mut last = Some(offset);
            for (size, stride) in shape.iter().zip(&strides) {
                last = last.and_then(|last| last.checked_add((size - 1).checked_mul(*stride)?));
            }
            let held = self.storages[storage].count;
            ensure!(
                last.is_some_and(|last| last < held),
                "offset {offset}, shape {shape:?} and strides {strides:?} leave its storage of {held} elements"
            );
        }
        Ok(TensorSpec { storage, offset, shape, strides })
    }

    fn new_object(&mut self) -> Result<()> {
        let empty = self.pop_tuple()?.is_empty();
        let class = self.pop()?;
        let is_namespace = matches!(class, Item::Global(Global::Namespace));
        ensure!(is_namespace && empty, "only argparse.Namespace may be made this way, without arguments");
        self.push_node(Node::Namespace { state: None })
    }

    /// The attributes of a Namespace; an OrderedDict's (`_metadata`) are ignored.
    fn build(&mut self) -> Result<()> {
        let state = self.pop()?;
        ensure!(matches!(self.node(state), Some(Node::Dict { .. })), "an object's state is not a dict");
        match self.top_node()? {
            Some(Node::Namespace { state: filled @ None }) => *filled = Some(state),
            Some(Node::Namespace { .. }) => bail!("a Namespace is filled twice"),
            Some(Node::Dict { ordered: true, .. }) => {}
            _ => bail!("an object that has no state is given one"),
        }
        Ok(())
    }

    fn persistent(&mut self) -> Result<()> {
        let items = self.pop_tuple()?;
        // A sixth item, in the legacy container, describes a view of a storage; no program writes one any more.
        let (&[tag, class, key, location, count] | &[tag, class, key, location, count, Item::None]) = items else {
            bail!("a storage is not (\"storage\", class, key, location, count)");
        };
        ensure!(&*self.str(tag)? == "storage", "a persistent object is not a storage");
        let Item::Global(Global::Storage(dtype)) = class else { bail!("a storage has no storage class") };
        let key = self.str(key)?;
        ensure!(key.len() <= LONGEST_KEY, "a storage's key has {} bytes (at most {LONGEST_KEY})", key.len());
        self.str(location)?;
        let count = size(count)?;
        let storage = match self.storage_by_key.get(&key) {
            Some(&known) => {
                let StorageSpec { dtype: as_dtype, count: as_count, .. } = self.storages[known];
                let same = (as_dtype, as_count) == (dtype, count);
                ensure!(same, "storage {} is {as_count} {as_dtype} here and {count} {dtype} there", quoted(&key));
                known
            }
            None => {
                self.storage_by_key.insert(key.clone(), self.storages.len());
                self.storages.push(StorageSpec { dtype, key, count });
                self.storages.len() - 1
            }
        };
        self.push_node(Node::Storage(storage))
    }
}

fn size(item: Item) -> Result<usize> {
    match item {
        Item::Int(i) => usize::try_from(i).map_err(|_| Error::new(format!("{i} is negative"))),
        _ => bail!("a number is missing"),
    }
}
