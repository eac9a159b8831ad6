// LangChain.js's ChatOpenAI, which n8n's nodes are built on: invoke, stream, tools and back, structured output.
import assert from 'node:assert/strict';
import { HumanMessage, SystemMessage, ToolMessage } from '@langchain/core/messages';
import { ChatOpenAI } from '@langchain/openai';

const ask = { model: 'fake', apiKey: 'none', maxRetries: 0, configuration: { baseURL: process.argv[2] } };
const weather = {
  type: 'function',
  function: {
    name: 'weather',
    description: 'Weather of a city',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  },
};
const city = {
  title: 'city',
  type: 'object',
  properties: { city: { type: 'string' }, degrees: { type: 'number' } },
  required: ['city', 'degrees'],
  additionalProperties: false,
};

for (const useResponsesApi of [false, true]) {
  const llm = new ChatOpenAI({ ...ask, useResponsesApi, temperature: 0.7 });
  assert.equal((await llm.invoke('Hi')).text, 'Hello.');
  let text = '';
  for await (const chunk of await llm.stream('Hi')) text += chunk.text;
  assert.equal(text, 'Hello.');

  const bound = llm.bindTools([weather]);
  const asked = [new SystemMessage('You are a helpful assistant'), new HumanMessage('Hi')];
  let said;
  for await (const chunk of await bound.stream(asked)) said = said ? said.concat(chunk) : chunk;
  for (const answer of [said, await bound.invoke(asked)]) {
    const [call] = answer.tool_calls;
    assert.deepEqual([call.name, call.args], ['weather', { city: 'Bonn' }]);
    const result = new ToolMessage({ content: '21 degrees', tool_call_id: call.id, name: 'weather' });
    assert.equal((await bound.invoke([...asked, answer, result])).text, 'It is 21 degrees in Bonn.');
  }
  const shaped = llm.withStructuredOutput(city, { method: 'jsonSchema', strict: true });
  assert.deepEqual(await shaped.invoke('Hi'), { city: 'Bonn', degrees: 21 });
}
